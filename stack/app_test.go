package stack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

var (
	appIP4 = netip.MustParseAddr("10.0.0.2")
	appIP6 = netip.MustParseAddr("fd00::2")
	srv4   = netip.MustParseAddrPort("203.0.113.7:80")
	srv6   = netip.MustParseAddrPort("[2001:db8::7]:80")
)

const offAll = tun.VnetHdr | tun.TSO | tun.USO

var offloads = map[string]tun.Offload{"full": offAll, "nouso": tun.VnetHdr | tun.TSO, "vnet": tun.VnetHdr, "off": 0}

// testApp is an app with a stack of its own at the other end of the pipe.
type testApp struct {
	t   testing.TB
	s   *shard
	dev *tuntest.Device
}

func newTestApp(t testing.TB, dev *tuntest.Device) *testApp {
	s := &shard{Stack: &Stack{handler: new(testHandler)}, dev: dev}
	s.shards = []*shard{s}
	e := &engine{link: newLink(s)}
	ns, err := newNetstack(e.link)
	if err != nil {
		t.Fatal(err)
	}
	e.ns = ns
	s.engine.Store(e)
	for _, a := range []struct {
		p tcpip.NetworkProtocolNumber
		a netip.Addr
	}{{ipv4.ProtocolNumber, appIP4}, {ipv6.ProtocolNumber, appIP6}} {
		pa := tcpip.ProtocolAddress{Protocol: a.p, AddressWithPrefix: addrTo(a.a).WithPrefix()}
		if err := ns.AddProtocolAddress(nicID, pa, gstackPrimary); err != nil {
			t.Fatal(err)
		}
	}
	ns.SetPromiscuousMode(nicID, false)
	done := make(chan struct{})
	go func() {
		defer close(done)
		newFrameReader(s).run()
	}()
	t.Cleanup(func() {
		dev.Close()
		<-done
		ns.Destroy()
	})
	return &testApp{t: t, s: s, dev: dev}
}

func (a *testApp) dial(ctx context.Context, dst netip.AddrPort) (*gonet.TCPConn, error) {
	return a.dialFrom(ctx, netip.AddrPort{}, dst)
}

func (a *testApp) dialFrom(ctx context.Context, src, dst netip.AddrPort) (*gonet.TCPConn, error) {
	proto := header.IPv4ProtocolNumber
	if dst.Addr().Is6() {
		proto = header.IPv6ProtocolNumber
	}
	local := tcpip.FullAddress{}
	if src.IsValid() {
		local = tcpip.FullAddress{NIC: nicID, Addr: addrTo(src.Addr()), Port: src.Port()}
	}
	return gonet.DialTCPWithBind(
		ctx,
		a.s.engine.Load().ns,
		local,
		tcpip.FullAddress{NIC: nicID, Addr: addrTo(dst.Addr()), Port: dst.Port()},
		proto,
	)
}

func (a *testApp) mustDial(dst netip.AddrPort) *gonet.TCPConn {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	c, err := a.dial(ctx, dst)
	if err != nil {
		a.t.Fatalf("dial %v: %v", dst, err)
	}
	a.t.Cleanup(func() { c.Close() })
	return c
}

// testHandler hands requests to f, or to a channel.
type testHandler struct {
	f  func(flow.StreamRequest)
	ch chan flow.StreamRequest
}

func (h *testHandler) HandleStream(_ int, r flow.StreamRequest) {
	switch {
	case h.f != nil:
		h.f(r)
	case h.ch != nil:
		h.ch <- r
	}
}
func (h *testHandler) HandlePackets(int, []flow.Packet) {}

// testConn is a listener that blocks as a connection does, for tests.
type testConn struct {
	mu   sync.Mutex
	cond sync.Cond
	st   flow.Stream
	err  error
	open bool
	ev   flow.Events
	n    int // calls of Opened
}

func newTestConn() *testConn {
	c := new(testConn)
	c.cond.L = &c.mu
	return c
}

func (c *testConn) Opened(st flow.Stream, err error) {
	c.mu.Lock()
	c.st, c.err, c.open = st, err, true
	c.n++
	c.ev = flow.Readable | flow.Writable
	c.mu.Unlock()
	c.cond.Broadcast()
}

func (c *testConn) Ready(ev flow.Events) {
	c.mu.Lock()
	c.ev |= ev
	c.mu.Unlock()
	c.cond.Broadcast()
}

// accept accepts r and waits for Opened.
func accept(t testing.TB, r flow.StreamRequest) *testConn {
	t.Helper()
	c := newTestConn()
	r.Accept(c)
	if err := c.opened(); err != nil {
		t.Fatalf("Opened: %v", err)
	}
	t.Cleanup(func() { c.st.Close() })
	return c
}

func (c *testConn) opened() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.open {
		c.cond.Wait()
	}
	return c.err
}

var errTime = errors.New("nothing happened for " + testkit.Patience.String())

// await waits for one of the events.
func (c *testConn) await(ev flow.Events) error {
	late := false
	tm := time.AfterFunc(testkit.Patience, func() {
		c.mu.Lock()
		late = true
		c.mu.Unlock()
		c.cond.Broadcast()
	})
	defer tm.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.ev&ev == 0 {
		if late {
			return errTime
		}
		c.cond.Wait()
	}
	c.ev &^= ev
	return nil
}

func (c *testConn) Read(b []byte) (int, error) {
	w := &sliceWriter{b: b}
	for {
		n, err := c.st.ReadTo(w)
		if n > 0 || !errors.Is(err, flow.ErrAgain) {
			return n, err
		}
		if err := c.await(flow.Readable | flow.Hup); err != nil {
			return 0, err
		}
	}
}

type sliceWriter struct {
	b []byte
	n int
}

func (w *sliceWriter) Write(p []byte) (int, error) {
	n := copy(w.b[w.n:], p)
	w.n += n
	return n, nil
}

func (c *testConn) Write(b []byte) (int, error) {
	r := bytes.NewReader(b)
	for r.Len() > 0 {
		_, err := c.st.WriteFrom(r)
		if errors.Is(err, flow.ErrAgain) {
			err = c.await(flow.Writable | flow.Hup)
		}
		if err != nil {
			return len(b) - r.Len(), err
		}
	}
	return len(b), nil
}

// testPair is a running stack and an app.
type testPair struct {
	*testApp
	st   *Stack
	reqs chan flow.StreamRequest
}

func newPair(t testing.TB, off tun.Offload, cfg Config) *testPair {
	testkit.CheckLeaks(t)
	a, b := tuntest.Pipe(1500, off)
	p := &testPair{reqs: make(chan flow.StreamRequest, 2000)}
	if cfg.Handler == nil {
		cfg.Handler = &testHandler{ch: p.reqs}
	}
	cfg.Device = a
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.st = s
	p.testApp = newTestApp(t, b)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return p
}

func (p *testPair) request() flow.StreamRequest {
	p.t.Helper()
	select {
	case r := <-p.reqs:
		return r
	case <-time.After(testkit.Patience):
		p.t.Fatal("no request came")
		return nil
	}
}

// connect opens a connection and returns both ends.
func (p *testPair) connect(dst netip.AddrPort) (*gonet.TCPConn, *testConn) {
	p.t.Helper()
	type res struct {
		c   *gonet.TCPConn
		err error
	}
	ch := make(chan res, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
		defer cancel()
		c, err := p.dial(ctx, dst)
		ch <- res{c, err}
	}()
	up := accept(p.t, p.request())
	r := <-ch
	if r.err != nil {
		p.t.Fatalf("dial: %v", r.err)
	}
	p.t.Cleanup(func() { r.c.Close() })
	return r.c, up
}

var (
	_ io.ReadWriter = (*testConn)(nil)
	_ net.Conn      = (*gonet.TCPConn)(nil)
	_               = tcp.ProtocolNumber
)
