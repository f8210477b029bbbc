package kernel

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// testCgroup makes a control group and gives its path below the mount, and a way to send a datagram from inside.
func testCgroup(t *testing.T, name string) (path string, send func(dst string) error) {
	t.Helper()
	mount, err := cgroupMount()
	if err != nil {
		t.Skip(err)
	}
	dir := filepath.Join(mount, fmt.Sprintf("viasocks-test-%d-%s", os.Getpid(), name))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skip("cannot make a cgroup: ", err)
	}
	t.Cleanup(func() {
		testkit.Until(testkit.Patience, func() bool { return os.Remove(dir) == nil }) // its processes are gone then
	})
	return filepath.Base(dir), func(dst string) error {
		return exec.Command("bash", "-c", fmt.Sprintf("echo $$ > %s/cgroup.procs && echo canary > /dev/udp/%s/7777", dir, dst)).
			Run()
	}
}

func TestCgroups(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		out, fromOut := testCgroup(t, "out")
		_, fromElse := testCgroup(t, "else")
		for _, include := range []bool{false, true} {
			c := testConfig(t)
			if include {
				c.Include.Cgroups = []string{out}
			} else {
				c.Exclude.Cgroups = []string{out}
			}
			h, tun := up(t, c)
			for _, dst := range []string{far4, far6} {
				if got := w.passes(!include, func() error { return fromOut(dst) }); got == include {
					t.Errorf("include %v, %s, of the group: passed %v", include, dst, got)
				}
				if got := w.passes(include, func() error { return fromElse(dst) }); got != include {
					t.Errorf("include %v, %s, of another group: passed %v", include, dst, got)
				}
			}
			down(t, h)
			tun.Close()
		}
		c := testConfig(t)
		c.Exclude.Cgroups = []string{"no/such/group"}
		h, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Shut(); err == nil || !strings.Contains(err.Error(), "no/such/group") {
			t.Errorf("a group that is not there: %v", err)
		}
		if err := h.Open(); err != nil {
			t.Error(err)
		}
		h.Close()
	})
}

// Our own sockets are of our uid, where one is given.
func TestOwnUID(t *testing.T) {
	for _, uid := range []uint32{uint32(os.Getuid()), 4321} {
		inNamespace(t, func(t *testing.T) {
			w := newWorld(t)
			c := testConfig(t)
			c.OwnUID = &uid
			c.Upstreams = []Endpoint{{unix.IPPROTO_UDP, netip.MustParseAddrPort(far4 + ":7777")}}
			h, tun := up(t, c)
			want := uid == uint32(os.Getuid())
			if got := w.passes(want, probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777, mark: c.Marks.Own}.send); got != want {
				t.Errorf("uid %d: passed %v", uid, got)
			}
			down(t, h)
			tun.Close()
		})
	}
}

func TestFailOpen(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConfig(t)
		c.Guard, c.FailOpen = time.Second, true
		h, tun := up(t, c)
		_ = probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777, bind: "eth0"}.send()
		if s := w.take(); len(s) > 0 {
			t.Errorf("the daemon lives: %v", s)
		}
		h.Close()
		tun.Close()
		ip(t, "link del viasocks0")           // as one that is not persistent goes
		testkit.Pace(1100 * time.Millisecond) // the guard ends
		for _, dst := range []string{far4, far6} {
			if !w.passes(true, probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777}.send) {
				t.Errorf("the daemon is dead and the host closed to %s", dst)
			}
		}
		if _, err := Undo(c); err != nil {
			t.Error(err)
		}
	})
}

// An answer for port 53 of a LAN address comes out of the TUN, where strict reverse path filtering must expect it.
func TestDNSAnswer(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		newWorld(t)
		strictPaths(t)
		h, tun := up(t, testConfig(t))
		c, err := net.Dial("udp", lan4+":53")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = c.Write([]byte("query"))
		b := make([]byte, 2000)
		var n int
		testkit.Until(testkit.Patience, func() bool {
			n, err = unix.Read(int(fd(tun)), b)
			return err == nil && b[0]>>4 == 4 && b[9] == unix.IPPROTO_UDP
		})
		if err != nil || n != 20+8+5 {
			t.Fatalf("the question did not come to the TUN: %d, %v", n, err)
		}
		p := append([]byte(nil), b[:n]...)
		copy(p[12:16], b[16:20])
		copy(p[16:20], b[12:16])
		copy(p[20:22], b[22:24])
		copy(p[22:24], b[20:22])
		p[26], p[27] = 0, 0 // no checksum
		if _, err := unix.Write(int(fd(tun)), p); err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(testkit.Patience))
		if n, err := c.Read(b); err != nil || string(b[:n]) != "query" {
			t.Errorf("the answer did not come: %q, %v", b[:n], err)
		}
		down(t, h)
		tun.Close()
	})
}

// A TUN, or a host, without IPv6: it is refused, never left alone.
func TestNoIPv6(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		before := state(t)
		h, err := New(testConfig(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Shut(); err != nil {
			t.Fatal(err)
		}
		tun := testTUN(t)
		if err := writeSysctl("net/ipv6/conf/viasocks0/disable_ipv6", "1"); err != nil {
			t.Fatal(err)
		}
		if err := h.Steer(); err != nil {
			t.Fatal(err)
		}
		if s := ip(t, "-6 route show table 30323"); !strings.Contains(s, "unreachable default") {
			t.Errorf("table: %s", s)
		}
		if err := (probe{typ: unix.SOCK_DGRAM, dst: far6, port: 7777}).send(); err == nil {
			t.Error("IPv6 is not refused")
		}
		w.mustBeClosed(t, "steered")
		down(t, h)
		tun.Close()
		checkRestored(t, before)
	})
}

// A service that is restarted gets another control group of the same name. The filter takes it, and can be replaced while
// there is none.
func TestCgroupMadeAnew(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		out, from := testCgroup(t, "anew")
		mount, err := cgroupMount()
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(mount, out)
		for _, include := range []bool{false, true} {
			c := testConfig(t)
			c.Guard = time.Second
			if include {
				c.Include.Cgroups = []string{out}
			} else {
				c.Exclude.Cgroups = []string{out}
			}
			h, tun := up(t, c)
			ctx, cancel := context.WithCancel(context.Background())
			ran := make(chan struct{})
			go func() { defer close(ran); h.Run(ctx) }()
			testkit.Eventually(t, "the group is empty", func() bool { return os.Remove(dir) == nil })
			h.mu.Lock()
			err := h.applyFilter()
			h.mu.Unlock()
			if err != nil {
				t.Errorf("include %v: while the group is gone: %v", include, err)
			}
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			testkit.Eventually(t, "the new group is known", func() bool {
				_ = w.take()
				_ = from(far4)
				return (len(w.take()) > 0) == !include
			})
			for range 3 {
				if got := w.passes(!include, func() error { return from(far4) }); got == include {
					t.Errorf("include %v, of the new group: passed %v", include, got)
				}
			}
			cancel()
			<-ran
			down(t, h)
			tun.Close()
		}
	})
}
