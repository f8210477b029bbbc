package netns

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// ip runs ip(8) in the tests' namespace, or skips where there is none.
func ip(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Skipf("ip %s: %v: %s", args, err, out)
	}
}

// watching runs a Watch until the test ends.
func watching(t *testing.T) (w *Watch, changes <-chan Change) {
	t.Helper()
	w, err := NewWatch(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	c := make(chan Change, 1000)
	done := make(chan struct{})
	go func() { defer close(done); w.Run(func(x Change) { c <- x }) }()
	t.Cleanup(func() {
		w.Close()
		w.Close()
		select {
		case <-done:
		case <-time.After(testkit.Patience):
			t.Error("Run goes on after Close")
		}
	})
	return w, c
}

func await(t *testing.T, changes <-chan Change, what string, want func(Change) bool) {
	t.Helper()
	late := time.After(testkit.Patience)
	for {
		select {
		case c := <-changes:
			if want(c) {
				return
			}
		case <-late:
			t.Fatalf("not told: %s", what)
		}
	}
}

func TestWatch(t *testing.T) {
	network(t)
	fds := testkit.CountFiles(t)
	t.Cleanup(func() {
		if n := testkit.CountFiles(t); n != fds {
			t.Errorf("%d open files, %d before", n, fds)
		}
	})
	queues, name, err := OpenTUN(TUNOptions{Name: "vsw%d"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { CloseTUN(queues) })
	link, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	w, changes := watching(t)
	isLink := func(c Change) bool { return c.Link == link.Index }
	isAddr := func(a string) func(Change) bool {
		return func(c Change) bool { return c.Addr == netip.MustParsePrefix(a) && c.AddrLink == link.Index }
	}
	isDefault := func(c Change) bool { return c.DefaultRoute }
	for _, c := range []struct {
		ip   string
		want func(Change) bool
	}{
		{"link set " + name + " up", isLink},
		{"addr add 10.98.4.1/24 dev " + name, isAddr("10.98.4.1/24")},
		{"addr add 10.98.5.1 peer 10.98.5.2/32 dev " + name, isAddr("10.98.5.1/32")},
		{"-6 addr add fd00:98:4::1/64 dev " + name + " nodad", isAddr("fd00:98:4::1/64")},
		{"route add default metric 77 dev " + name, isDefault},
		{"-6 route add default metric 77 dev " + name, isDefault},
		{"route del default metric 77", isDefault},
		{"addr del 10.98.4.1/24 dev " + name, isAddr("10.98.4.1/24")},
		{"link set " + name + " down", isAddr("fd00:98:4::1/64")},
	} {
		ip(t, c.ip)
		await(t, changes, c.ip, c.want)
	}
	hearsNews(t, name, changes)

	// The kernel ends the subscription: it is made again, and knows that something may have been missed.
	w.mu.Lock()
	w.sock.Close()
	w.mu.Unlock()
	await(t, changes, "the loss", func(c Change) bool { return c.Lost })
	ip(t, "addr add 10.98.8.1/32 dev "+name)
	await(t, changes, "an address after the loss", isAddr("10.98.8.1/32"))
}

// hearsNews makes changes that are no news, such as a lifetime that is renewed, other tables and other routes, and then one
// that is: it is the next that is told.
func hearsNews(t *testing.T, name string, changes <-chan Change) {
	t.Helper()
	for _, args := range []string{"link set " + name + " up", "addr change 10.98.5.1 peer 10.98.5.2/32 dev " + name +
		" valid_lft 1000 preferred_lft 1000",
		"route add default dev " + name + " table 77", "route add 10.98.6.0/24 dev " + name, "addr add 10.98.7.1/32 dev " +
			name} {
		ip(t, args)
	}
	await(t, changes, "the last address", func(c Change) bool {
		if c.DefaultRoute || c.Addr.IsValid() && !c.Addr.Addr().IsLinkLocalUnicast() && c.Addr.String() != "10.98.7.1/32" {
			t.Errorf("%+v is told", c)
		}
		return c.Addr.IsValid() && c.Addr.String() == "10.98.7.1/32"
	})
}

// mendCases are the cases of TestMend.
var mendCases = []struct {
	ip   []string
	want []string
}{
	{nil, nil},
	{[]string{"link set vsx0 down"}, []string{"is down", "lacks the address fd00:98:9::1"}},
	{[]string{"link set vsx0 down", "link set vsx0 name vsx-other"},
		[]string{"has the name vsx-other", "is down", "lacks the address fd00:98:9::1"}},
	{[]string{"link set vsx0 down", "link set vsx0 name vsx-other", "link set vsx-other up"},
		[]string{"has the name vsx-other", "lacks the address fd00:98:9::1"}},
	{[]string{"addr del 10.98.9.1/32 dev vsx0"}, []string{"lacks the address 10.98.9.1"}},
	{[]string{"addr flush dev vsx0"}, []string{"lacks the address 10.98.9.1", "lacks the address fd00:98:9::1"}},
	{[]string{"link set vsx0 mtu 1300"}, []string{"has an MTU of 1300"}},
}

// TestMend: what others do to an interface is seen and undone.
func TestMend(t *testing.T) {
	network(t)
	addrs := []netip.Prefix{netip.MustParsePrefix("10.98.9.1/32"), netip.MustParsePrefix("fd00:98:9::1/128")}
	queues, name, err := OpenTUN(TUNOptions{Name: "vsx0", MTU: 1400, Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer CloseTUN(queues)
	if _, err := Configure(name, 1400, addrs, false); err != nil {
		t.Fatal(err)
	}
	link, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	w := Wanted{Index: link.Index, Name: name, MTU: 1400, Addrs: addrs}
	for _, c := range mendCases {
		for _, args := range c.ip {
			ip(t, args)
		}
		if got, err := w.Faults(); !slices.Equal(got, c.want) || err != nil {
			t.Errorf("%q: faults %q, %v; want %q", c.ip, got, err, c.want)
		}
		if ipv6, err := w.Mend(); !ipv6 || err != nil {
			t.Errorf("%q: IPv6 %v, %v", c.ip, ipv6, err)
		}
		if got, err := w.Faults(); len(got) > 0 || err != nil {
			t.Errorf("%q: after it was mended %q, %v", c.ip, got, err)
		}
	}
	// The name is taken.
	ip(t, "link set vsx0 down")
	ip(t, "link set vsx0 name vsx-other")
	ip(t, "link add vsx0 type bridge")
	if _, err := w.Mend(); !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "rename or delete that one") {
		t.Errorf("the name is taken: %v", err)
	}
	ip(t, "link del vsx0")
	if _, err := w.Mend(); err != nil {
		t.Error(err)
	}
	ip(t, "link del vsx0")
	if _, err := w.Faults(); !errors.Is(err, ErrNoInterface) {
		t.Errorf("deleted: %v", err)
	}
	if _, err := w.Mend(); !errors.Is(err, ErrNoInterface) {
		t.Errorf("deleted: %v", err)
	}
}
