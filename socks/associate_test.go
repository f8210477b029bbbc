package socks

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"weak"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestRepairRelay(t *testing.T) {
	const public, private, loop, public6 = "203.0.113.1:1080", "10.0.0.1:1080", "127.0.0.1:1080", "[2001:db8::1]:1080"
	const never, here = "192.0.2.66:5000", "198.51.100.1:5000"
	canBePeer := func(a netip.Addr) bool { return a != netip.MustParseAddrPort(never).Addr() && scope(a) > scopeNone }
	onHost := func(a netip.Addr) bool {
		return a.IsLoopback() || netip.MustParsePrefix("198.51.100.0/24").Contains(a)
	}
	name := Addr{Name: "relay.example", Port: 5000}
	tests := []struct {
		bound, server, want string
	}{
		{"203.0.113.1:5000", public, "203.0.113.1:5000"},
		{"203.0.113.2:5000", public, "203.0.113.2:5000"}, // another public one: the server's choice
		{"0.0.0.0:5000", public, "203.0.113.1:5000"},
		{"[::]:5000", public, "203.0.113.1:5000"},
		{"[::]:5000", public6, "[2001:db8::1]:5000"},
		{"0.0.0.0:0", public, "203.0.113.1:1080"},
		{"203.0.113.2:0", public, "203.0.113.1:1080"},
		{"10.1.2.3:5000", public, "203.0.113.1:5000"},
		{"192.168.0.1:5000", public, "203.0.113.1:5000"},
		{"100.64.0.1:5000", public, "203.0.113.1:5000"},
		{"169.254.0.1:5000", public, "203.0.113.1:5000"},
		{"127.0.0.1:5000", public, "203.0.113.1:5000"},
		{"[fd00::1]:5000", public6, "[2001:db8::1]:5000"},
		{"[fe80::1]:5000", public6, "[2001:db8::1]:5000"},
		{"[fe80::1]:5000", "[fd00::1]:1080", "[fd00::1]:5000"},
		{"[fe80::1]:5000", "[fe80::2%lo]:1080", "[fe80::2%lo]:5000"},
		{"[::1]:5000", public6, "[2001:db8::1]:5000"},
		{"[::ffff:203.0.113.2]:5000", public, "203.0.113.2:5000"},
		{"[::ffff:10.0.0.1]:5000", public, "203.0.113.1:5000"},
		{"224.0.0.1:5000", public, "203.0.113.1:5000"},
		{"255.255.255.255:5000", loop, "127.0.0.1:5000"},
		{"[ff02::1]:5000", public6, "[2001:db8::1]:5000"},
		{"10.1.2.3:5000", private, "10.1.2.3:5000"}, // both private: another machine of the same network
		{"10.1.2.3:5000", loop, "10.1.2.3:5000"},
		{"127.0.0.1:5000", private, "10.0.0.1:5000"},
		{"127.0.0.1:5000", loop, "127.0.0.1:5000"},
		{"0.1.2.3:5000", loop, "127.0.0.1:5000"},
		// Never a peer, wherever the server is, unless it is the server itself.
		{never, public, "203.0.113.1:5000"},
		{never, loop, "127.0.0.1:5000"},
		{never, private, "10.0.0.1:5000"},
		{never, "192.0.2.66:1080", never},
		// This host is no relay of a server elsewhere.
		{here, public, "203.0.113.1:5000"},
		{here, private, "10.0.0.1:5000"},
		{here, loop, here},
		{here, "198.51.100.2:1080", here}, // two addresses of this host
		{"203.0.113.2:5000", private, "203.0.113.2:5000"},
		{"[2001:db8::2]:5000", public, "[2001:db8::2]:5000"},
	}
	for _, tt := range tests {
		server := netip.MustParseAddrPort(tt.server)
		got, repaired := repairRelay(AddrFrom(netip.MustParseAddrPort(tt.bound)), server, canBePeer, onHost)
		if got.String() != tt.want || repaired != (netip.MustParseAddrPort(tt.bound).Addr().Unmap() != got.Addr()) {
			t.Errorf("%s behind %s: %v (repaired %v), want %s", tt.bound, tt.server, got, repaired, tt.want)
		}
	}
	if got, _ := repairRelay(name, netip.MustParseAddrPort(public), canBePeer, onHost); got.String() != "203.0.113.1:5000" {
		t.Errorf("a name: %v", got)
	}
}

func TestOnHost(t *testing.T) {
	for a, want := range map[string]bool{"127.0.0.1": true, "127.9.9.9": true, "::1": true, "203.0.113.77": false,
		"2001:db8::77": false} {
		if got := OnHost(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		ip, _ := netip.AddrFromSlice(a.(*net.IPNet).IP)
		if !OnHost(ip.Unmap()) {
			t.Errorf("%v is an address of this host", ip)
		}
	}
}

// exchange sends a datagram to dst and returns what comes back, and from whom.
func exchange(t testing.TB, u net.Conn, dst netip.AddrPort, payload string) (netip.AddrPort, string) {
	t.Helper()
	if _, err := u.Write(append(UDPCodec{}.AppendHeader(nil, dst), payload...)); err != nil {
		t.Fatal(err)
	}
	return receive(t, u)
}

func receive(t testing.TB, u net.Conn) (netip.AddrPort, string) {
	t.Helper()
	b := make([]byte, 2000)
	n, err := u.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	src, h, err := UDPCodec{}.ParseHeader(b[:n])
	if err != nil {
		t.Fatal(err)
	}
	return src, string(b[h:n])
}

// echoUDP sends back what it gets.
func echoUDP(t testing.TB) netip.AddrPort {
	t.Helper()
	u, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	t.Cleanup(func() { u.Close(); <-ended })
	go func() {
		defer close(ended)
		b := make([]byte, 2000)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			u.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return u.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestAssociate(t *testing.T) {
	var marked atomic.Int32
	d, c, srv := setup(t, Options{PrepareSocket: func(int) error { marked.Add(1); return nil }}, sockstest.WithRedirectsOnly())
	dst := netip.MustParseAddrPort("203.0.113.5:6881")
	srv.Redirect(dst, echoUDP(t))
	a, err := associate(t, c, context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if r := srv.Requests(); len(r) != 1 || r[0].Cmd != sockstest.CmdAssociate ||
		r[0].Dst != (sockstest.Addr{IP: netip.IPv4Unspecified()}) {
		t.Errorf("requests %+v", r)
	}
	if keepAlive(d, a) != 1 {
		t.Error("no keepalive on the control connection")
	}
	fd, err := a.Dial()
	if err != nil {
		t.Fatal(err)
	}
	if marked.Load() != 2 {
		t.Errorf("PrepareSocket saw %d sockets, want 2", marked.Load())
	}
	if fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); fl&unix.O_NONBLOCK == 0 || err != nil {
		t.Errorf("the socket blocks: %x, %v", fl, err)
	}
	u := conn(t, fd)
	if src, p := exchange(t, u, dst, "ping"); src != dst || p != "ping" {
		t.Errorf("%q from %v", p, src)
	}
	srvA := srv.Associations()[0]
	if srvA.Relay() != a.Relay() {
		t.Errorf("relay %v, the server's is %v", a.Relay(), srvA.Relay())
	}
	hearsOnlyRelay(t, u, srvA)
	// From here on nothing refers to a but the loop; garbage collection must not end it.
	a2 := weakly(a)
	for range 3 {
		runtime.GC()
	}
	if src, p := exchange(t, u, dst, "still"); src != dst || p != "still" {
		t.Errorf("%q from %v", p, src)
	}
	a = a2()
	if a == nil {
		t.Fatal("the association was collected")
	}
	a.Close()
	a.Close()
	if _, ok := srv.WaitAssociations(0, testkit.Patience); !ok {
		t.Error("the server still has the association")
	}
	testkit.Eventually(t, "all to be given back", func() bool { return d.Stats() == Stats{} })
}

// keepAlive is the option of the association's control connection.
func keepAlive(d *Dialer, a *Association) int {
	alive := make(chan int, 1)
	on(d).Post(func() {
		v, _ := unix.GetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		alive <- v
	})
	return <-alive
}

// hearsOnlyRelay has the server send by the relay and from elsewhere: the socket is connected, and so hears no stranger.
func hearsOnlyRelay(t *testing.T, u net.Conn, srvA *sockstest.Association) {
	t.Helper()
	if err := srvA.SendStranger([]byte("\x00\x00\x00\x01\x01\x02\x03\x04\x00\x05stranger")); err != nil {
		t.Fatal(err)
	}
	stranger := netip.MustParseAddrPort("[2001:db8::7]:7")
	if err := srvA.Send(sockstest.AddrFrom(stranger), []byte("relay")); err != nil {
		t.Fatal(err)
	}
	if src, p := receive(t, u); src != stranger || p != "relay" {
		t.Errorf("%q from %v", p, src)
	}
}

// weakly finds the association again if the loop keeps it.
func weakly(a *Association) func() *Association {
	w := weak.Make(a)
	return w.Value
}

func TestAssociationEnds(t *testing.T) {
	_, c, srv := setup(t, Options{})
	tests := []struct {
		name string
		end  func(a *sockstest.Association)
		want error
	}{
		{"FIN", func(a *sockstest.Association) { a.Cut(sockstest.FIN) }, io.EOF},
		{"RST", func(a *sockstest.Association) { a.Cut(sockstest.RST) }, syscall.ECONNRESET},
	}
	for _, tt := range tests {
		for _, late := range []bool{false, true} {
			a, err := associate(t, c, context.Background())
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 2)
			if !late {
				a.OnClose(func(error) { t.Error("replaced, and told") })
				a.OnClose(func(err error) { ended <- err })
			}
			tt.end(srv.Associations()[0])
			if late {
				testkit.Eventually(t, "the error", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.err != nil })
				a.OnClose(func(err error) { ended <- err })
				a.OnClose(func(err error) { ended <- errors.New("told twice") })
			}
			var se *ServerError
			if err := <-ended; !errors.Is(err, tt.want) || !errors.As(err, &se) || se.Op != OpAssociation {
				t.Errorf("%s, late %v: %v", tt.name, late, err)
			}
			a.Close()
			srv.WaitAssociations(0, testkit.Patience)
			if len(ended) > 0 {
				t.Errorf("%s, late %v: then %v", tt.name, late, <-ended)
			}
		}
	}
}

// TestAssociationClosed: who closes it is not told.
func TestAssociationClosed(t *testing.T) {
	d, c, _ := setup(t, Options{})
	a, err := associate(t, c, context.Background())
	if err != nil {
		t.Fatal(err)
	}
	a.OnClose(func(err error) { t.Errorf("told %v", err) })
	a.Close()
	testkit.Eventually(t, "all to be given back", func() bool { return d.Stats() == Stats{} })
	a.OnClose(func(err error) { t.Errorf("told %v", err) })
}

// TestAssociationCloseRaces: the server's end comes between Close and its turn on the loop.
func TestAssociationCloseRaces(t *testing.T) {
	d, c, _ := setup(t, Options{})
	a, err := associate(t, c, context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan struct{})
	on(d).Post(func() { a.Close(); a.end(io.EOF); close(ran) })
	<-ran
	a.OnClose(func(err error) { t.Errorf("told %v", err) })
	testkit.Eventually(t, "all to be given back", func() bool { return d.Stats() == Stats{} })
}

func TestAssociationJunk(t *testing.T) {
	_, c, srv := setup(t, Options{})
	for _, tt := range []struct {
		junk int
		ends bool
	}{{maxJunk, false}, {maxJunk + 1, true}} {
		srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Fault{Extra: make([]byte, tt.junk)} })
		a, err := associate(t, c, context.Background())
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		a.OnClose(func(err error) { ended <- err })
		limit := 100 * time.Millisecond
		if tt.ends {
			limit = testkit.Patience
		}
		select {
		case err := <-ended:
			if !tt.ends || !errors.Is(err, ErrMalformed) {
				t.Errorf("%d bytes: %v", tt.junk, err)
			}
		case <-time.After(limit):
			if tt.ends {
				t.Errorf("%d bytes are read without end", tt.junk)
			}
		}
		a.Close()
	}
}

func TestAssociateFaults(t *testing.T) {
	_, c, srv := setup(t, Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(7) })
	if _, err := associate(t, c, context.Background()); !errors.Is(err, ReplyCommandNotSupported) {
		t.Errorf("%v", err)
	}
	// No target can be silent: it is the server.
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	hasty := newDialer(t, Options{HandshakeTimeout: 100 * time.Millisecond}).Client(c.Server())
	_, err := associate(t, hasty, context.Background())
	var se *ServerError
	if !errors.As(err, &se) || errors.Is(err, ErrSilent) {
		t.Errorf("%v", err)
	}
	// Bad relay addresses: all lead to the server.
	for _, bound := range []sockstest.Addr{
		{IP: netip.IPv4Unspecified(), Port: 5000}, {IP: netip.IPv6Unspecified(), Port: 5000}, {Name: "relay.example", Port: 5000},
		{IP: netip.MustParseAddr("224.1.2.3"), Port: 5000}, {IP: netip.MustParseAddr("203.0.113.9"), Port: 0},
	} {
		srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Bound(bound) })
		a, err := associate(t, c, context.Background())
		if err != nil {
			t.Fatal(err)
		}
		want := netip.AddrPortFrom(srv.Addr().Addr(), 5000)
		if bound.Port == 0 {
			want = srv.Addr()
		}
		if a.Relay() != want {
			t.Errorf("%v: relay %v, want %v", bound, a.Relay(), want)
		}
		a.Close()
	}
}
