package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// A change fails, and the daemon is gone at that instant: whatever step it was, what is left is closed or untouched,
// Undo brings the host back, and so does another start.
func TestKilledAtEachStep(t *testing.T) {
	for _, again := range []bool{false, true} {
		inNamespace(t, func(t *testing.T) {
			foreignRules(t)
			before := state(t)
			c := testConfig(t)
			c.Log = nil
			n := 1
			for ; killedAt(t, c, n); n++ {
				if again {
					startAgain(t, c, n)
				} else if _, err := Undo(c); err != nil {
					t.Errorf("step %d: undo: %v", n, err)
				}
				if after := state(t); after != before {
					t.Fatalf("step %d: not as it was:\n%s\n--- before\n%s", n, after, before)
				}
				if f, _ := filepath.Glob(filepath.Join(c.Dir, "*.journal*")); len(f) > 0 {
					t.Errorf("step %d: %v is left", n, f)
				}
			}
			if n < 20 {
				t.Errorf("only %d steps", n)
			}
		})
	}
}

// killedAt starts and stops a Host whose nth step fails. It returns false if there are fewer steps than that.
func killedAt(t *testing.T, c Config, n int) bool {
	t.Helper()
	killed := errors.New("killed")
	left := n
	step = func() error {
		if left--; left < 0 {
			return killed
		}
		return nil
	}
	defer func() { step = func() error { return nil } }()
	h, err := New(c)
	if err != nil {
		t.Fatalf("step %d: %v", n, err)
	}
	var tun *os.File
	for _, f := range []func() error{
		h.Shut, func() error { tun = testTUN(t); return nil }, h.Steer, h.Unsteer, h.Open} {
		if err = f(); err != nil {
			break
		}
	}
	h.Close()
	if tun != nil {
		tun.Close()
	}
	if err != nil && !errors.Is(err, killed) {
		t.Fatalf("step %d: %v", n, err)
	}
	return err != nil
}

// startAgain starts a second daemon after one that was killed at its nth step, and stops it.
func startAgain(t *testing.T, c Config, n int) {
	t.Helper()
	h, err := New(c)
	if err != nil {
		t.Fatalf("step %d: second start: %v", n, err)
	}
	if err := h.Shut(); err != nil {
		t.Fatalf("step %d: second start: %v", n, err)
	}
	tun := testTUN(t)
	if err := h.Steer(); err != nil {
		t.Fatalf("step %d: second start: %v", n, err)
	}
	if got := strings.Count(ip(t, "-4 rule")+ip(t, "-6 rule"), "proto 118"); got != 18 {
		t.Errorf("step %d: second start: %d rules", n, got)
	}
	tun.Close()
	down(t, h)
}

// foreignRules are what docker, firewalld and wg-quick would have.
func foreignRules(t *testing.T) {
	t.Helper()
	ip(
		t,
		"rule add not fwmark 51820 table 51820",
		"rule add table main suppress_prefixlength 0",
		"-6 rule add not fwmark 51820 table 51820",
		"route add default dev br0 table 51820",
		"route add 10.9.0.0/16 via 198.51.100.1",
	)
	nft(t, "add table ip nat")
	nft(t, "add chain ip nat POSTROUTING { type nat hook postrouting priority 100; policy accept; }")
	nft(t, "add rule ip nat POSTROUTING ip saddr 172.17.0.0/16 oifname != docker0 counter masquerade")
	nft(t, "add table inet firewalld")
	nft(t, "add chain inet firewalld filter_INPUT { type filter hook input priority 10; policy accept; }")
	nft(t, "add rule inet firewalld filter_INPUT ct state established,related accept")
}

// No journal, a corrupt one, one that lies.
func TestUndoWithoutJournal(t *testing.T) {
	for _, content := range []string{"none", "", "{", "{}", `{"version":1,"tun":"x","table":5,"nft_table":"a b"}`,
		`{"version":1,"tun":"viasocks0","table":5,"nft_table":"viasocks","sysctls":[{"Key":"kernel/panic","Old":"1","New":"0"}]}`} {
		inNamespace(t, func(t *testing.T) {
			foreignRules(t)
			before := state(t)
			c := testConfig(t)
			h, tun := up(t, c)
			h.Close()
			tun.Close()
			if content == "none" {
				os.Remove(h.path)
			} else if err := os.WriteFile(h.path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			lines, err := Undo(Config{Dir: c.Dir})
			if err != nil || len(lines) < 20 {
				t.Errorf("journal %q: %v, %v", content, lines, err)
			}
			if after := state(t); after != before {
				t.Errorf("journal %q: not as it was:\n%s\n--- before\n%s", content, after, before)
			}
			lines, err = Undo(Config{Dir: c.Dir})
			if err != nil || len(lines) != 0 {
				t.Errorf("second time: %v, %v", lines, err)
			}
		})
	}
}

func TestSecondDaemon(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := testConfig(t)
		h, tun := up(t, c)
		defer tun.Close()
		during := state(t)
		if _, err := New(c); !errors.Is(err, ErrRunning) {
			t.Errorf("second daemon: %v", err)
		}
		if _, err := Undo(c); !errors.Is(err, ErrRunning) {
			t.Errorf("undo under a living daemon: %v", err)
		}
		if now := state(t); now != during {
			t.Error("the second one has touched something")
		}
		down(t, h)
	})
}

func TestTaken(t *testing.T) {
	for _, tt := range []struct{ cmd, want string }{
		{"ip rule add fwmark 5 table 30323", "table 30323"},
		{"ip route add 203.0.113.0/24 via 198.51.100.1 table 30323", "table 30323"},
		{"ip rule add priority 9004 table main", "priorities 9000 to 9019"},
		{"ip -6 rule add fwmark 0x76000000/0xff000000 table main", "mark 0x76000000"},
		{"ip link add viasocks0 type dummy0", ""},
		{"ip link add viasocks0 type bridge", "viasocks0"},
		{"nft add table inet viasocks", "viasocks"},
		{"ip rule add fwmark 0x4000/0x4000 table 7 priority 5210", ""}, // tailscale's, kube's: other bits
		{"ip rule add fwmark 0xca6c table 51820", ""},
	} {
		inNamespace(t, func(t *testing.T) {
			f := strings.Fields(tt.cmd)
			if strings.HasSuffix(tt.cmd, "dummy0") {
				return
			}
			if f[0] == "ip" {
				ip(t, strings.Join(f[1:], " "))
			} else {
				nft(t, f[1:]...)
			}
			before := state(t)
			h, err := New(testConfig(t))
			if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %v, want something with %q", tt.cmd, err, tt.want)
			}
			if err == nil {
				h.Close()
			} else if strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: more than a line: %v", tt.cmd, err)
			}
			if after := state(t); after != before {
				t.Errorf("%s: something was touched: %s", tt.cmd, difference(before, after))
			}
		})
	}
}

// What others remove comes back at once; what they do again and again does not make us busy.
func TestPutBack(t *testing.T) {
	for _, owned := range []bool{true, false} {
		inNamespace(t, func(t *testing.T) { putBack(t, owned) })
	}
}

func putBack(t *testing.T, owned bool) {
	w := newWorld(t)
	c := testConfig(t)
	changed := make(chan struct{}, 100)
	c.OnDefaultRoute = func() { changed <- struct{}{} }
	h, tun := upOwned(t, c, owned)
	defer tun.Close()
	settled(t)
	during := state(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { h.Run(ctx); close(done) }()
	putsBack(t, owned, during)
	w.mustBeClosed(t, "steered")
	followsAddresses(t, changed)
	ip(t, "rule add priority 100 to 203.0.113.0/24 table main")
	testkit.Eventually(t, "a warning of the foreign rule", func() bool { return len(h.Warnings()) > 0 })
	w.mustBeClosed(t, "steered")
	staysCalm(t, h, func() { cancel(); <-done })
	down(t, h)
}

// putsBack removes parts of what Steer has made, and wants each of them back.
func putsBack(t *testing.T, owned bool, during string) {
	t.Helper()
	for _, cmd := range []string{"ip -4 rule flush protocol 118", "ip -6 rule flush protocol 118",
		"ip rule del priority 9007", "ip route flush table 30323",
		"ip -6 route flush table 30323", "nft flush ruleset", "nft delete table inet viasocks",
		"nft flush chain inet viasocks output", "nft flush table arp viasocks",
		"nft insert rule inet viasocks output accept"} {
		f := strings.Fields(cmd)
		start := time.Now()
		if f[0] == "ip" {
			ip(t, strings.Join(f[1:], " "))
		} else if owned && f[1] != "flush" || owned && f[2] != "ruleset" {
			continue // the kernel says no
		} else {
			nft(t, f[1:]...)
		}
		for state(t) != during {
			if time.Since(start) > testkit.Patience {
				t.Fatalf("%s: not put back: %s", cmd, state(t))
			}
		}
		t.Logf("owned %v, %s: as before after %v", owned, cmd, time.Since(start))
	}
}

// followsAddresses changes addresses and default routes, and wants the steering to follow.
func followsAddresses(t *testing.T, changed <-chan struct{}) {
	t.Helper()
	ip(
		t,
		"addr add 10.5.5.5/24 dev br0",
		"addr add 198.51.100.3/24 dev eth0",
		"route replace default via 198.51.100.1 dev eth0 src 198.51.100.3",
	)
	testkit.Eventually(t, "addresses and routes followed", func() bool {
		return strings.Contains(ip(t, "rule"), "to 10.5.5.0/24 goto 9019") &&
			strings.Contains(ip(t, "route show table 30323"), "src 198.51.100.3")
	})
	select {
	case <-changed:
	case <-time.After(testkit.Patience):
		t.Error("nobody said that the default route has changed")
	}
	ip(
		t,
		"addr add 2001:db8:1::3/64 dev eth0 nodad",
		"-6 route replace default via 2001:db8:1::1 dev eth0 src 2001:db8:1::3",
	)
	testkit.Eventually(t, "IPv6 source followed", func() bool {
		return strings.Contains(ip(t, "-6 route show table 30323"), "src 2001:db8:1::3")
	})
	ip(t, "addr del 10.5.5.5/24 dev br0")
}

// staysCalm removes rules for a second, as somebody does who never tires, and counts the changes until stop has returned.
func staysCalm(t *testing.T, h *Host, stop func()) {
	t.Helper()
	count := func(f func() error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		step = f
	}
	steps := 0
	count(func() error { steps++; return nil })
	start := time.Now()
	for time.Since(start) < time.Second {
		ip(t, "-4 rule flush protocol 118")
	}
	stop()
	count(func() error { return nil })
	if times := time.Since(start)/putBackEvery + 3; steps > int(times)*13 {
		t.Errorf("%d changes in %v of fight", steps, time.Since(start))
	}
}

// The plan is what nft(8) and ip(8) take, and what New, Shut and Steer do.
func TestPlan(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := testConfig(t)
		c.Exclude = Selection{
			Networks: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:9::/64")},
			Ports:    []PortRange{{123, 123}, {5000, 5010}},
			UIDs:     []UIDRange{{4000, 4010}, {7, 7}},
			Devices:  []string{"wg9"},
		}
		c.Include = Selection{UIDs: []UIDRange{{1, 2}}}
		c.Strict = true
		before := state(t)
		h, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		lines, err := h.Plan()
		if err != nil {
			t.Fatal(err)
		}
		h.Close()
		if state(t) != before {
			t.Error("a plan has touched something")
		}
		planned := carryOut(t, c, lines)
		h, tun := up(t, c)
		samePlan(t, planned, state(t))
		down(t, h)
		tun.Close()
	})
}

// carryOut has nft(8) and ip(8) do what a plan says, returns the host's state then, and undoes it.
func carryOut(t *testing.T, c Config, lines []string) (planned string) {
	t.Helper()
	script := ""
	for _, l := range lines {
		if s, ok := strings.CutPrefix(l, "nft "); ok {
			script += s + "\n"
		}
	}
	f := filepath.Join(t.TempDir(), "plan")
	if err := os.WriteFile(f, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	nft(t, "-f", f)
	tun := testTUN(t)
	for _, l := range lines {
		if s, ok := strings.CutPrefix(l, "ip "); ok {
			ip(t, s)
		}
	}
	planned = state(t)
	for _, tt := range []string{"inet", "arp", "netdev"} {
		nft(t, "delete", "table", tt, "viasocks")
	}
	if _, err := Undo(c); err != nil { // the rules and routes have our number
		t.Error(err)
	}
	tun.Close()
	ip(t, "link del viasocks0")
	return planned
}

// samePlan wants the host's state to be the same by a plan as by what Steer did.
func samePlan(t *testing.T, planned, done string) {
	t.Helper()
	for _, s := range []string{"-4 rule", "-6 rule"} {
		a, b := section(planned, s), section(done, s)
		if a != b {
			t.Errorf("%s: planned\n%s\n--- done\n%s", s, a, b)
		}
	}
	_, planned, _ = strings.Cut(planned, "# nft\n")
	_, done, _ = strings.Cut(done, "# nft\n")
	// and an empty line
	if a, b := strings.Count(planned, "\n"), strings.Count(done, "\n")-2*strings.Count(done, "flags owner"); a != b {
		t.Errorf("planned %d lines\n%s--- done %d\n%s", a, planned, b, done)
	}
}

func section(state, name string) string {
	for _, s := range strings.Split(state, "# ") {
		if strings.HasPrefix(s, "ip "+name+"\n") || strings.HasPrefix(s, name+"\n") {
			return s
		}
	}
	return fmt.Sprintf("no section %q", name)
}

func TestConfigErrors(t *testing.T) {
	for _, f := range []func(*Config){
		func(c *Config) { c.TUN = "" }, func(c *Config) { c.TUN = strings.Repeat("x", 16) }, func(c *Config) { c.Table = 254 },
		func(c *Config) { c.Table = 0 },
		func(c *Config) { c.Priority = 32760 }, func(c *Config) { c.Priority = -1 }, func(c *Config) { c.NFTable = "a b" },
		func(c *Config) { c.Marks = MarksFrom(1, 1) },
		func(c *Config) {
			c.Marks.Inbound = c.Marks.Own
		}, func(c *Config) { c.Marks.Own = 1 }, func(c *Config) { c.Guard = time.Millisecond },
		func(c *Config) {
			c.Exclude.Ports = make([]PortRange, maxList+1)
		}, func(c *Config) { c.Upstreams = make([]Endpoint, maxEndpoints+1) },
	} {
		c := testConfig(t)
		f(&c)
		if h, err := New(c); err == nil {
			h.Close()
			t.Errorf("taken: %+v", c)
		} else if !strings.HasPrefix(err.Error(), "cannot ") {
			t.Error(err)
		}
	}
}

func TestMarksFrom(t *testing.T) {
	for _, tt := range []Marks{{Mask: 0xff000000, Own: 0x76000000}, {Mask: 0x7, Own: 0x1}, {Mask: 0xffffffff, Own: 0xffffffff},
		{Mask: 0x15, Own: 0x10}, {Mask: 0x80000003, Own: 0x80000003}} {
		m := MarksFrom(tt.Own, tt.Mask)
		seen := map[uint32]bool{}
		for _, v := range []uint32{m.Own, m.Direct, m.Captured, m.Inbound, m.Declined, m.Bridged, m.Returned} {
			if v == 0 || v&^m.Mask != 0 || seen[v] {
				t.Errorf("%+v", m)
			}
			seen[v] = true
		}
	}
	if m := MarksFrom(1, 1); m.Direct != 0 {
		t.Errorf("%+v", m)
	}
}

// A journal of a network namespace that has ended, whose number the kernel gave to a new one, is no proof that the host is
// closed: a start that fails leaves the host open, as it was.
func TestJournalOfAnother(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := testConfig(t)
		h, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		h.j.Done["filter"], h.j.TUN = true, "other0"
		if err := h.j.write(h.path); err != nil {
			t.Fatal(err)
		}
		h.Close()
		h, err = New(c)
		if err != nil {
			t.Fatal(err)
		}
		if h.Recovered() {
			t.Error("taken for what a dead daemon has left")
		}
		h.Close()
		if _, err := Undo(c); err != nil {
			t.Error(err)
		}
	})
}
