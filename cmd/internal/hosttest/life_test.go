package hosttest

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// closedUp is a world with a viasocks that is up; it skips the test where up is not closed yet.
func closedUp(t *testing.T, flags ...string) (*world, *daemon) {
	t.Helper()
	w := newWorld(t)
	w.hostServers()
	serve(w.listen("world", ":77"), echo)
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	w.proxy(proxy4 + ":1080")
	d := w.up(append([]string{"--proxy", proxyURL}, flags...)...)
	if why := w.notClosed(); why != "" {
		t.Skip(why)
	}
	return w, d
}

// TestTUNAddressIsHidden: the LAN can't use the TUN's addresses, and nobody answers for them.
func TestTUNAddressIsHidden(t *testing.T) {
	if !apart(t) {
		return
	}
	w, d := closedUp(t)
	for _, killed := range []bool{false, true} {
		if killed {
			d.kill()
		}
		for _, by := range []string{"via " + hostLAN4, ""} { // routed to the host; asked for by ARP
			w.ip("router", "route replace 198.18.0.1/32 "+by+" dev host0")
			w.refuses("router", "198.18.0.1")
		}
		for _, by := range []string{"via " + hostLAN6, ""} {
			w.ip("router", "-6 route replace fd76:6961:736f:636b::1/128 "+by+" dev host0")
			w.refuses("router", "fd76:6961:736f:636b::1")
		}
		if out := w.ip("router", "neigh show to 198.18.0.1") + w.ip("router",
			"-6 neigh show to fd76:6961:736f:636b::1"); strings.Contains(
			out,
			"lladdr",
		) {
			t.Errorf("killed %v: the host answers for the TUN's address: %s", killed, out)
		}
	}
	w.ip("host", "link del "+tunName)
	w.errorsAtOnce("killed, and the TUN deleted")
}

func (w *world) refuses(ns, to string) {
	w.t.Helper()
	err := in(ns, func() error {
		c, err := net.DialTimeout("tcp", netipAddrPort(to, sshPort).String(), 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil {
		w.t.Errorf("%s answers %s", to, ns)
	}
}

// TestRoutesOfOthers: others can still set routes by a gateway that is connected, as a DHCP client does after a link flap,
// and the routes lead where they did.
func TestRoutesOfOthers(t *testing.T) {
	if !apart(t) {
		return
	}
	w, d := closedUp(t)
	for _, killed := range []bool{false, true} {
		if killed {
			d.kill()
		}
		for _, gw := range []string{router4, lanRouter4, router6, lanRouter6, routerLL} {
			for _, dev := range []string{" dev eth0", ""} {
				to := "203.0.113.128/25"
				if strings.Contains(gw, ":") {
					to = "2001:db8:f:8000::/65"
				}
				if gw == routerLL && dev == "" {
					continue
				}
				if _, err := try("", nil, strings.Fields("ip -n host route add "+to+" via "+gw+dev)...); err != nil {
					if dev != "" { // without one the kernel asks our rules, and none is better than the TUN
						t.Errorf("killed %v: %v", killed, err)
					}
					continue
				}
				family := "-4 "
				if strings.Contains(gw, ":") {
					family = "-6 "
				}
				if out := w.ip("host", family+"route show "+to); !strings.Contains(out, "dev eth0") {
					t.Errorf("killed %v: route add %s via %s%s gave %s", killed, to, gw, dev, out)
				}
				w.ip("host", "route del "+to)
			}
		}
		// The link flaps.
		w.ip(
			"host",
			"link set eth0 down\nlink set eth0 up\naddr replace "+host6+"/64 dev eth0 nodad\naddr replace "+hostLAN6+
				"/64 dev eth0 nodad",
		)
		for _, r := range []string{"route replace default via " + router4 + " dev eth0", "-6 route replace default via " +
			router6 + " dev eth0"} {
			if _, err := try("", nil, strings.Fields("ip -n host "+r)...); err != nil {
				t.Errorf("killed %v, after the link was down: %v", killed, err)
			}
		}
		if !killed {
			w.eventually(
				testkit.Patience,
				"after the link was down ssh works",
				func() bool { _, err := w.login(client4, host4); return err == nil },
			)
			w.eventually(testkit.Patience, "after the link was down viasocks carries", func() bool {
				_, err := w.dial("host", netipAddrPort("203.0.113.7", 77))
				return err == nil
			})
		}
	}
}

// errorsAtOnce: with viasocks dead, and known to be, programs get an error and do not hang.
func (w *world) errorsAtOnce(when string) {
	w.t.Helper()
	for _, to := range []string{"203.0.113.7", "2001:db8:f::7", lanRouter4} {
		for _, dev := range []string{"", "eth0"} {
			port := uint16(77)
			if to == lanRouter4 {
				port = 53
			}
			took, err := w.connect(netipAddrPort(to, port), dev)
			for try := 1; try < 4 && took > 500*time.Millisecond; try++ { // the machine may have stalled
				took, err = w.connect(netipAddrPort(to, port), dev)
			}
			w.t.Logf("%s: connect(%s) bound to %q: %v after %v", when, to, dev, err, took.Round(time.Millisecond))
			if err == nil || took > 500*time.Millisecond {
				w.t.Errorf("%s: connect(%s) bound to %q: %v after %v", when, to, dev, err, took)
			}
		}
	}
}

// guard is a little more than the time for which the TUN takes packets that no daemon reads.
const guard = 11 * time.Second

// connect is a connect() in the host namespace.
func (w *world) connect(to netip.AddrPort, dev string) (took time.Duration, err error) {
	_ = in("host", func() error {
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		var fd int
		if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return nil
		}
		defer unix.Close(fd)
		if dev != "" {
			if err = unix.BindToDevice(fd, dev); err != nil {
				return nil
			}
		}
		start := time.Now()
		if err = unix.Connect(fd, sockaddr(to)); err == unix.EINPROGRESS {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			for n := 0; n <= 0 && time.Since(start) < 3*time.Second; {
				n, _ = unix.Poll(p, 3000)
			}
			n, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
			if err = unix.Errno(n); n == 0 {
				err = nil
			}
		}
		took = time.Since(start)
		return nil
	})
	return took, err
}

// TestConfirm: without a confirmation everything is undone; with one it stays.
func TestConfirm(t *testing.T) {
	if !apart(t) {
		return
	}
	if !has("confirm") {
		t.Skip("viasocks has no confirm yet")
	}
	w := newWorld(t)
	w.hostServers()
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	w.proxy(proxy4 + ":1080")
	before := w.state()
	d := w.up("--proxy", proxyURL, "--confirm", "5s")
	_ = d.wait()
	w.same("without a confirmation", before, w.state())

	d = w.up("--proxy", proxyURL, "--confirm", "5s")
	if out, err := w.command("confirm"); err != nil {
		t.Errorf("confirm: %v\n%s", err, out)
	}
	testkit.Never(t, 6*time.Second, "it was undone all the same", func() bool { return !d.alive() })
	if err := d.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	w.same("after the stop", before, w.state())
}

// TestClosedAtOnce: after `close`, and after a stop that leaves the host closed, programs get an error at once.
func TestClosedAtOnce(t *testing.T) {
	if !apart(t) {
		return
	}
	w, d := closedUp(t, "--stay-closed")
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	w.errorsAtOnce("stopped with --stay-closed")
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	if out, err := w.command("close", "--proxy", proxyURL); err != nil {
		t.Errorf("close: %v\n%s", err, out)
	}
	w.errorsAtOnce("closed")
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
}
