package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// farUDP is a UDP socket in the world.
func farUDP(t testing.TB, host string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	needWorld(t)
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(host), 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func recv(t testing.TB, c *net.UDPConn) (string, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 65536)
	c.SetReadDeadline(time.Now().Add(testkit.Patience))
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatalf("no datagram: %v", err)
	}
	return string(b[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func send(t testing.TB, c *net.UDPConn, to netip.AddrPort, what string) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(what), to); err != nil {
		t.Fatalf("cannot send %d bytes to %v: %v", len(what), to, err)
	}
}

func other(host string) string {
	if host == world4 {
		return other4
	}
	return other6
}

func TestDatagrams(t *testing.T) {
	eachOffload(t, func(t *testing.T, offload string) {
		proxy := listenSOCKS(t)
		a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
		eachFamily(t, func(t *testing.T, host string) {
			t.Run("mapping and filtering", func(t *testing.T) { testMapping(t, a, host) })
			t.Run("sizes", func(t *testing.T) { testSizes(t, a, host) })
			t.Run("burst", func(t *testing.T) { testBurst(t, a, host) })
		})
		for _, r := range proxy.Requests() {
			if r.Cmd == sockstest.CmdAssociate && (r.Dst.Port != 0 || r.Dst.Name != "" || !r.Dst.IP.IsUnspecified()) {
				t.Errorf("ASSOCIATE was sent with DST %v: it must not be the target", r.Dst)
			}
		}
	})
}

// testMapping: RFC 4787: one mapping whatever the destination, and whoever knows it can send to the app, which sees the
// true source.
func testMapping(t *testing.T, a *app, host string) {
	app := a.udp(host == world6)
	one, oneAddr := farUDP(t, host)
	two, twoAddr := farUDP(t, other(host))
	send(t, app, oneAddr, "to one")
	got, mapped := recv(t, one)
	if got != "to one" {
		t.Errorf("the far end read %q", got)
	}
	send(t, app, twoAddr, "to two")
	if _, m := recv(t, two); m.Port() != mapped.Port() {
		t.Errorf("the second destination sees port %d, the first %d: not endpoint-independent", m.Port(), mapped.Port())
	}
	stranger, strangerAddr := farUDP(t, other(host))
	for _, s := range []struct {
		c    *net.UDPConn
		from netip.AddrPort
	}{{one, oneAddr}, {two, twoAddr}, {stranger, strangerAddr}} {
		send(t, s.c, netip.AddrPortFrom(s.from.Addr(), mapped.Port()), "hello")
		if got, from := recv(t, app); got != "hello" || from != s.from {
			t.Errorf("the app read %q from %v, want it from %v", got, from, s.from)
		}
	}
}

// testSizes: datagrams from 0 bytes to the limit of the encapsulation, fragmented by the app's kernel where they must be.
func testSizes(t *testing.T, a *app, host string) {
	app := a.udp(host == world6)
	far, addr := farUDP(t, host)
	limit := 65497
	if host == world6 {
		limit = 65485
	}
	send(t, app, addr, "first") // the association is there
	_, mapped := recv(t, far)
	mapped = netip.AddrPortFrom(addr.Addr(), mapped.Port())
	for _, size := range []int{0, 1, 512, 1452, 1453, 1472, 1473, 1474, 2953, 9000, 32768, limit - 1, limit} {
		payload := string(bytes.Repeat([]byte{byte(size)}, size))
		send(t, app, addr, payload)
		if got, _ := recv(t, far); got != payload {
			t.Fatalf("%d bytes up arrived as %d", size, len(got))
		}
		send(t, far, mapped, payload)
		if got, from := recv(t, app); got != payload || from != addr {
			t.Fatalf("%d bytes down arrived as %d from %v", size, len(got), from)
		}
	}
	send(t, app, addr, string(make([]byte, limit+1))) // over the limit: dropped, and nothing else is hurt
	send(t, app, addr, "after")
	if got, _ := recv(t, far); got != "after" {
		t.Errorf("after a datagram over the limit %d bytes arrived", len(got))
	}
}

// testBurst: runs of equal and unequal datagrams, as uTP sends them, keep their borders and their order.
func testBurst(t *testing.T, a *app, host string) {
	app := a.udp(host == world6)
	far, addr := farUDP(t, host)
	far.SetReadBuffer(4 << 20)
	app.SetReadBuffer(4 << 20)
	send(t, app, addr, "first")
	_, mapped := recv(t, far)
	mapped = netip.AddrPortFrom(addr.Addr(), mapped.Port())
	// The longest that is not fragmented. Fragments may come by another queue of the TUN, and so later: the kernel knows no
	// ports of theirs, as a network card does not.
	longest := 1500 - 20 - 8
	if host == world6 {
		longest = 1500 - 40 - 8
	}
	sizes := []int{1200, 1200, 1200, 1200, 700, 1200, 1200, 1, 0, 64, 64, 64, longest, longest, longest}
	for _, way := range []struct {
		from, to *net.UDPConn
		dst      netip.AddrPort
	}{{app, far, addr}, {far, app, mapped}} {
		// Five bursts of thirty: each has room in the buffers on its way, though nobody reads while it is sent.
		for first := 0; first < 10*len(sizes); first += 2 * len(sizes) {
			for i := first; i < first+2*len(sizes); i++ {
				size := sizes[i%len(sizes)]
				send(t, way.from, way.dst, string(bytes.Repeat([]byte{byte(i)}, size)))
			}
			for i := first; i < first+2*len(sizes); i++ {
				size := sizes[i%len(sizes)]
				if got, _ := recv(t, way.to); len(got) != size || (size > 0 && got[0] != byte(i)) {
					t.Fatalf("datagram %d: %d bytes, want %d", i, len(got), size)
				}
			}
		}
	}
}

// exchange sends what to the far end and a reply back, and reports whether both arrived within 200 ms.
func exchange(t *testing.T, app, far *net.UDPConn, addr netip.AddrPort, what string) bool {
	t.Helper()
	send(t, app, addr, what)
	b := make([]byte, 100)
	for {
		far.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, from, err := far.ReadFromUDPAddrPort(b)
		if err != nil {
			return false
		}
		if string(b[:n]) != what { // one that was late
			continue
		}
		send(t, far, netip.AddrPortFrom(addr.Addr(), from.Port()), "re: "+what)
		app.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, src, err := app.ReadFromUDPAddrPort(b)
		for err == nil && string(b[:n]) != "re: "+what && strings.HasPrefix(string(b[:n]), "re: ") { // one that was late
			n, src, err = app.ReadFromUDPAddrPort(b)
		}
		if err != nil {
			return false // by the association that was cut
		}
		if string(b[:n]) != "re: "+what || netip.AddrPortFrom(src.Addr().Unmap(), src.Port()) != addr {
			t.Fatalf("the app read %q from %v", b[:n], src)
		}
		return true
	}
}

// TestAssociationLost: the control connection ends; the app's socket goes on without noticing.
func TestAssociationLost(t *testing.T) { eachApart(t, testAssociationLost) }

func testAssociationLost(t *testing.T, offload string) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
	app := a.udp(false)
	far, addr := farUDP(t, world4)
	send(t, app, addr, "before")
	recv(t, far)
	for i := range 2 {
		proxy.CutAll(sockstest.FIN)
		deadline := time.Now().Add(2 * testkit.Patience)
		// For a moment, the old association may still carry something.
		again := func() bool { return proxy.Stats().Associations >= uint64(i)+2 }
		for n := 0; !exchange(t, app, far, addr, fmt.Sprintf("again %d %d", i, n)) || !again(); n++ {
			if time.Now().After(deadline) {
				t.Fatal("the association was not made again")
			}
		}
	}
	if n := proxy.Stats().Associations; n != 3 {
		t.Errorf("%d associations were made, want 3", n)
	}
}

// TestNoUDP: the proxy has no UDP: the program's socket gets ECONNREFUSED at once, and DNS and TCP go on.
func TestNoUDP(t *testing.T) { eachApart(t, testNoUDP) }

func testNoUDP(t *testing.T, offload string) {
	proxy := listenSOCKS(t)
	proxy.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Cmd == sockstest.CmdAssociate {
			return sockstest.Reply(7)
		}
		return sockstest.Fault{}
	})
	a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
	eachFamily(t, func(t *testing.T, host string) {
		dst := netip.AddrPortFrom(netip.MustParseAddr(host), 6881)
		for try := 1; ; try++ { // the machine may be what is slow, but not each time
			fd := a.socket(family(dst), unix.SOCK_DGRAM)
			defer unix.Close(fd)
			if err := unix.Connect(fd, sockaddr(dst)); err != nil {
				t.Fatal(err)
			}
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO,
				&unix.Timeval{Sec: int64(testkit.Patience / time.Second)})
			start := time.Now()
			if _, err := unix.Write(fd, []byte("x")); err != nil {
				t.Fatal(err)
			}
			_, err := unix.Read(fd, make([]byte, 10))
			for errors.Is(err, syscall.EINTR) { // a signal of the Go runtime's
				_, err = unix.Read(fd, make([]byte, 10))
			}
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("recv() gives %v, want ECONNREFUSED", err)
			}
			d := time.Since(start)
			if d <= time.Second {
				break
			}
			if try == 5 {
				t.Fatalf("it took %v", d)
			}
		}
	})
}

// TestMappingLife: a mapping lives as long as the app's socket, and ends soon after it.
func TestMappingLife(t *testing.T) {
	t.Parallel()
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--udp-timeout", "10s")
	far, addr := farUDP(t, world4)
	app := a.udp(false)
	send(t, app, addr, "one")
	_, before := recv(t, far)
	testkit.Pace(13 * time.Second) // longer than --udp-timeout
	send(t, app, addr, "two")
	if _, after := recv(t, far); after != before {
		t.Errorf("the mapping of an open socket changed from %v to %v", before, after)
	}
	app.Close()
	testkit.EventuallyIn(t, 2*testkit.Patience, "the association of a closed socket ends", func() bool {
		return proxy.Stats().AssociationsOpen == 0
	})
}

// TestNotCarried: multicast and broadcast are dropped: none becomes an association.
func TestNotCarried(t *testing.T) { eachApart(t, testNotCarried) }

func testNotCarried(t *testing.T, offload string) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
	app := a.udp(false)
	for _, dst := range []string{"239.192.152.143:6771", "239.255.255.250:1900", "224.0.0.251:5353"} {
		if _, err := app.WriteToUDPAddrPort([]byte("x"), netip.MustParseAddrPort(dst)); err != nil &&
			!errors.Is(err, os.ErrDeadlineExceeded) {
			t.Logf("%s: %v", dst, err)
		}
	}
	app6 := a.udp(true)
	if _, err := app6.WriteToUDPAddrPort([]byte("x"), netip.MustParseAddrPort("[ff15::efc0:988f]:6771")); err != nil {
		t.Logf("ff15::efc0:988f: %v", err)
	}
	far, addr := farUDP(t, world4)
	send(t, a.udp(false), addr, "control")
	recv(t, far)
	if n := proxy.Stats().Associations; n != 1 {
		t.Errorf("%d associations, want the control's alone", n)
	}
}
