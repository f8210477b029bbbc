package netns

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

func TestOpenTUNErrors(t *testing.T) {
	network(t)
	fds := testkit.CountFiles(t)
	for _, c := range []struct {
		name string
		o    TUNOptions
		want string
	}{
		{"name too long", TUNOptions{Name: "a-name-of-sixteen"}, "at most 15 bytes"},
		{"name not valid", TUNOptions{Name: "a/b"}, "the name is not valid"},
		{"in use", TUNOptions{Name: "vsn0"}, "device or resource busy: another program uses it"},
		{"no TUN", TUNOptions{Name: "lo"}, "no TUN of this kind"},
		{"MTU", TUNOptions{MTU: 10}, "MTU of"},
	} {
		queues, _, err := OpenTUN(c.o)
		CloseTUN(queues)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}

func TestNoTUNNode(t *testing.T) {
	network(t)
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, "mode=755"); err != nil {
		t.Skip(err)
	}
	defer unix.Unmount("/dev/net", unix.MNT_DETACH)
	for _, c := range []struct {
		make func() error
		want string
	}{
		{func() error { return nil }, "cannot open /dev/net/tun: no such file or directory: run 'modprobe tun'"},
		{func() error {
			return unix.Mknod(tunNode, unix.S_IFCHR|0o666, int(unix.Mkdev(239, 77)))
		}, "cannot open /dev/net/tun: no such device or address: the kernel has no TUN driver"},
	} {
		if err := c.make(); err != nil {
			t.Skip(err)
		}
		if _, _, err := OpenTUN(TUNOptions{}); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
		// The same line from the helper.
		if _, err := Spawn(t.Context(), testSpec("true")); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("Spawn: %v, want %q", err, c.want)
		}
	}
	os.Remove(tunNode)
	if err := unix.Mknod(tunNode, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 200))); err != nil {
		t.Skip(err)
	}
	out, err := asOrdinaryUser("-test.run=^TestSpawnSignal$", "-test.v")
	if want := "cannot open /dev/net/tun: permission denied: run as root, or let everyone open it"; err != nil ||
		!strings.Contains(string(out), want) {
		t.Errorf("%v %s, want %q", err, out, want)
	}
}

func TestPersist(t *testing.T) {
	network(t)
	queues, name, err := OpenTUN(TUNOptions{Name: "vsp%d", MTU: 1400, Persist: true})
	if err != nil {
		t.Fatal(err)
	}
	CloseTUN(queues)
	defer exec.Command("ip", "link", "del", name).Run()
	addrs := []netip.Prefix{netip.MustParsePrefix("10.98.1.1/32"), netip.MustParsePrefix("fd00:98:1::1/128")}
	for range 2 { // as it was made, and taken over again
		queues, again, err := OpenTUN(TUNOptions{Name: name, Persist: true})
		if err != nil || again != name {
			t.Fatal(again, err)
		}
		if ipv6, err := Configure(name, 0, addrs, false); err != nil || !ipv6 {
			t.Errorf("IPv6 %v, %v", ipv6, err)
		}
		CloseTUN(queues)
	}
	if b, _ := os.ReadFile("/sys/class/net/" + name + "/mtu"); len(b) > 0 && string(b) != "1400\n" {
		t.Errorf("MTU %q", b)
	}
}

func TestConfigureWithoutIPv6(t *testing.T) {
	network(t)
	both := []netip.Prefix{netip.MustParsePrefix("fd00:98:2::1/128"), netip.MustParsePrefix("10.98.2.1/32")}
	for _, c := range []struct {
		name    string
		disable bool
		mtu     int
		addrs   []netip.Prefix
		ipv6    bool
	}{
		{"disable_ipv6", true, 1500, both, false},
		{"small MTU", false, 1000, both, false},
		{"IPv4 only", false, 1500, both[1:], false},
		{"both", false, 1280, both, true},
	} {
		queues, name, err := OpenTUN(TUNOptions{Name: "vsc%d"})
		if err != nil {
			t.Fatal(err)
		}
		if c.disable {
			if err := sysctl("net/ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil {
				t.Error(err)
			}
		}
		if ipv6, err := Configure(name, c.mtu, c.addrs, false); ipv6 != c.ipv6 || err != nil {
			t.Errorf("%s: IPv6 %v, %v", c.name, ipv6, err)
		}
		CloseTUN(queues)
	}
	if _, err := Configure("vs-none", 0, nil, false); err == nil || !strings.Contains(err.Error(), "cannot configure vs-none") {
		t.Error(err)
	}
}

// TestQueues: a TUN of several queues is taken over when nobody has it, and only then; one that was made for one queue, by
// somebody else or an older viasocks, has one.
func TestQueues(t *testing.T) {
	network(t)
	fds := testkit.CountFiles(t)
	many := TUNOptions{Name: "vsq%d", Persist: true, Queues: 4}
	queues, name, err := OpenTUN(many)
	if err != nil {
		t.Fatal(err)
	}
	defer exec.Command("ip", "link", "del", name).Run()
	if n, err := queueCount(name); len(queues) != 4 || n != 4 || err != nil {
		t.Errorf("%d files, %d queues, %v, want 4", len(queues), n, err)
	}
	many.Name = name
	if _, _, err := OpenTUN(many); err == nil || !errors.Is(err, errForeign) {
		t.Errorf("a second user: %v", err)
	}
	if n, err := queueCount(name); n != 4 || err != nil {
		t.Errorf("%d queues after it, %v", n, err)
	}
	CloseTUN(queues)
	if queues, _, err = OpenTUN(many); err != nil || len(queues) != 4 {
		t.Errorf("taken over: %d files, %v", len(queues), err)
	}
	CloseTUN(queues)

	one, name, err := OpenTUN(TUNOptions{Name: "vsq%d", Persist: true})
	if err != nil {
		t.Fatal(err)
	}
	defer exec.Command("ip", "link", "del", name).Run()
	many.Name = name
	if _, _, err := OpenTUN(many); err == nil || !strings.Contains(err.Error(), "another program uses it") {
		t.Errorf("a second user of one queue: %v", err)
	}
	CloseTUN(one)
	if queues, _, err = OpenTUN(many); err != nil || len(queues) != 1 {
		t.Errorf("one for one queue: %d files, %v", len(queues), err)
	}
	CloseTUN(queues)
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}

// TestNoQueueingDiscipline: the kernel makes one for each of the 256 queues there might be, unless it is told not to.
func TestNoQueueingDiscipline(t *testing.T) {
	network(t)
	queues, name, err := OpenTUN(TUNOptions{Name: "vsq%d", Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer CloseTUN(queues)
	if _, err := Configure(name, 1500, []netip.Prefix{netip.MustParsePrefix("10.98.3.1/32")}, false); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tc", "qdisc", "show", "dev", name).CombinedOutput()
	if err != nil {
		t.Skip(err)
	}
	if s := string(out); !strings.HasPrefix(s, "qdisc noqueue ") || strings.Count(s, "\n") != 1 {
		t.Errorf("%s", s)
	}
}
