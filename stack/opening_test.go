package stack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// listen lets the app listen at addr.
func (a *testApp) listen(addr netip.AddrPort) *gonet.TCPListener {
	a.t.Helper()
	proto := header.IPv4ProtocolNumber
	if addr.Addr().Is6() {
		proto = header.IPv6ProtocolNumber
	}
	at := tcpip.FullAddress{NIC: nicID, Addr: addrTo(addr.Addr()), Port: addr.Port()}
	l, err := gonet.ListenTCP(a.s.engine.Load().ns, at, proto)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { l.Close() })
	return l
}

func acceptOne(t *testing.T, l *gonet.TCPListener) net.Conn {
	t.Helper()
	got := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			got <- c
		}
	}()
	select {
	case c := <-got:
		t.Cleanup(func() { c.Close() })
		return c
	case <-time.After(testkit.Patience):
		t.Fatal("the app accepts nothing")
		return nil
	}
}

// A connection from outside reaches the app from its true source, with whatever offloads and number of shards, and
// both directions end in order.
func TestOpen(t *testing.T) {
	for name, off := range offloads {
		for _, pair := range []struct{ peer, app netip.AddrPort }{
			{srv4, netip.AddrPortFrom(appIP4, 6881)}, {srv6, netip.AddrPortFrom(appIP6, 6881)},
		} {
			t.Run(name+" "+pair.app.Addr().String(), func(t *testing.T) {
				p := newPair(t, off, Config{Shards: 3})
				l := p.listen(pair.app)
				r := p.st.Open(pair.peer, pair.app)
				if f := r.Flow(); f.Src != pair.app || f.Dst != pair.peer || f.Proto != flow.TCP {
					t.Errorf("the flow is %+v", f)
				}
				up := accept(t, r)
				c := acceptOne(t, l)
				if got := c.RemoteAddr().String(); got != pair.peer.String() {
					t.Errorf("the app sees %s, want %s", got, pair.peer)
				}
				bothWays(t, up, c)
				if n := p.st.Stats().Streams; n != 1 {
					t.Errorf("%d streams", n)
				}
			})
		}
	}
}

// bothWays sends 1 MB in both directions and then ends each.
func bothWays(t *testing.T, up *testConn, c net.Conn) {
	t.Helper()
	const size = 1 << 20
	c.SetDeadline(time.Now().Add(testkit.Patience))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, size))
		sent <- err
	}()
	if n, err := io.ReadFull(up, make([]byte, size)); err != nil {
		t.Fatalf("from the app came %d bytes: %v", n, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := up.Write(make([]byte, size))
		sent <- err
	}()
	if n, err := io.ReadFull(c, make([]byte, size)); err != nil {
		t.Fatalf("%d bytes came to the app: %v", n, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if err := up.st.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the app reads %d bytes and %v, want EOF", n, err)
	}
	c.(*gonet.TCPConn).CloseWrite()
	if n, err := up.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("we read %d bytes and %v, want EOF", n, err)
	}
}

// An app that does not listen refuses, and the listener learns it at once.
func TestOpenRefused(t *testing.T) {
	p := newPair(t, offAll, Config{})
	c := newTestConn()
	began := time.Now()
	p.st.Open(srv4, netip.AddrPortFrom(appIP4, 6881)).Accept(c)
	if err := c.opened(); !errors.Is(err, ErrAppGone) {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took > knockTime/2 {
		t.Errorf("it took %v", took)
	}
	if n := p.st.Stats().AcceptFailed; n != 1 {
		t.Errorf("%d failed", n)
	}
	if p.st.Renew(); p.st.Stats().Streams != 0 {
		t.Error("a stream is left")
	}
}

// A rejected request sends nothing, and a second one of the same peer is not disturbed by it.
func TestOpenRejected(t *testing.T) {
	p := newPair(t, offAll, Config{})
	app := netip.AddrPortFrom(appIP4, 6881)
	l := p.listen(app)
	r := p.st.Open(srv4, app)
	r.Reject(flow.RefuseReset)
	late := newTestConn()
	r.Accept(late)
	up := accept(t, p.st.Open(srv4, app))
	acceptOne(t, l)
	if late.mu.Lock(); late.n != 0 {
		t.Error("Accept after Reject had an effect")
	}
	late.mu.Unlock()
	// The four endpoints are in use: the same connection cannot be opened twice.
	c := newTestConn()
	p.st.Open(srv4, app).Accept(c)
	if err := c.opened(); !errors.Is(err, ErrAppGone) {
		t.Errorf("the second one: %v", err)
	}
	if _, err := up.Write([]byte("x")); err != nil {
		t.Error(err)
	}
}

// The end of the stack ends what is being opened, and later requests fail.
func TestOpenAtTheEnd(t *testing.T) {
	p := newPair(t, offAll, Config{})
	refused := newTestConn()
	p.st.Open(srv4, netip.AddrPortFrom(appIP4, 6881)).Accept(refused)
	_ = refused.opened()                            // the stack runs
	app := netip.MustParseAddrPort("10.0.0.9:6881") // where nobody answers
	conns := make([]*testConn, 20)
	for i := range conns {
		conns[i] = newTestConn()
		p.st.Open(netip.AddrPortFrom(srv4.Addr(), uint16(1000+i)), app).Accept(conns[i])
	}
	p.st.ResetAll()
	p.st.Close()
	conns = append(conns, newTestConn())
	p.st.Open(srv4, app).Accept(conns[len(conns)-1])
	for _, c := range conns {
		if err := c.opened(); !errors.Is(err, ErrAppGone) {
			t.Errorf("%v", err)
		}
	}
}
