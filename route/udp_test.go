package route

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

func datagram(src, dst, payload string) flow.Packet {
	return flow.Packet{
		Src:     netip.MustParseAddrPort(src),
		Dst:     netip.MustParseAddrPort(dst),
		Payload: []byte(payload),
		Head:    []byte("head"),
	}
}

func (g *rig) send(src, dst string, payload ...string) {
	var pkts []flow.Packet
	for _, p := range payload {
		pkts = append(pkts, datagram(src, dst, p))
	}
	g.HandlePackets(pkts)
}

// far is a UDP endpoint in the world, known to the app by another address.
type far struct {
	net.PacketConn
	t testing.TB
}

func newFar(t testing.TB, srv *sockstest.Server, as string) *far {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if srv != nil {
		srv.Redirect(netip.MustParseAddrPort(as), c.LocalAddr().(*net.UDPAddr).AddrPort())
	}
	return &far{c, t}
}

func (f *far) read() (string, net.Addr) {
	f.t.Helper()
	b := make([]byte, 65536)
	_ = f.SetReadDeadline(time.Now().Add(testkit.Patience))
	n, from, err := f.ReadFrom(b)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(b[:n]), from
}

func (f *far) write(to net.Addr, s string) {
	f.t.Helper()
	if _, err := f.WriteTo([]byte(s), to); err != nil {
		f.t.Fatal(err)
	}
}

func (g *rig) wantPacket(t *testing.T, src, dst, payload string) {
	t.Helper()
	testkit.Eventually(t, payload+" from "+src, func() bool {
		for _, p := range g.w.packets() {
			if string(p.Payload) == payload {
				if p.Src.String() != src || p.Dst.String() != dst {
					t.Fatalf("%s came from %v to %v, want from %s to %s", payload, p.Src, p.Dst, src, dst)
				}
				return true
			}
		}
		return false
	})
}

// One mapping for an app endpoint, whatever it talks to; and whoever answers is heard, under its own address.
func TestUDPEndpointIndependent(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	one := newFar(t, srv, "203.0.113.1:1000")
	two := newFar(t, srv, "[2001:db8::2]:2000")
	stranger := newFar(t, srv, "198.51.100.9:9")
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a1", "a2", "")
	var ext net.Addr
	for _, want := range []string{"a1", "a2", ""} {
		got, from := one.read()
		if ext = from; got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	g.send("10.0.0.1:5000", "[2001:db8::2]:2000", "b1")
	if got, from := two.read(); got != "b1" || from.String() != ext.String() {
		t.Errorf("the second destination got %q from %v, the first from %v", got, from, ext)
	}
	one.write(ext, "from one")
	two.write(ext, "from two")
	stranger.write(ext, "from a stranger")
	g.wantPacket(t, "203.0.113.1:1000", "10.0.0.1:5000", "from one")
	g.wantPacket(t, "[2001:db8::2]:2000", "10.0.0.1:5000", "from two")
	g.wantPacket(t, "198.51.100.9:9", "10.0.0.1:5000", "from a stranger")
	g.send("10.0.0.1:5001", "203.0.113.1:1000", "c1")
	if got, from := one.read(); got != "c1" || from.String() == ext.String() {
		t.Errorf("another app endpoint: %q from %v, which is the first one's", got, from)
	}
	if s := srv.Stats(); s.Associations != 2 {
		t.Errorf("%d associations for 2 app endpoints", s.Associations)
	}
	for _, r := range srv.Requests() {
		if r.Dst.String() != "0.0.0.0:0" {
			t.Errorf("ASSOCIATE names %v", r.Dst)
		}
	}
	if f := g.Flows(); len(f) != 2 || f[0].State != "open" || f[0].Up != 6 || f[0].Down != 31 || f[0].Proto != flow.UDP {
		t.Errorf("%+v", f)
	}
	g.Close()
	want := `flow=1 proto=udp src=10.0.0.1:5000 dst=203.0.113.1:1000 host="" rule=default upstream=p state=closed up=6 down=31 dur=`
	if lines := g.log.lines(want); len(lines) != 1 {
		t.Errorf("no line %q in %q", want, g.log.lines("msg=flow"))
	}
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "late")
	if g.Stats().MappingsNow != 0 {
		t.Error("a mapping after the end")
	}
}

// A server without UDP: each datagram is refused at once, one log line, and it is not asked again for a while.
func TestUDPRefusedByServer(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(7) })
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, func(r *Router) { r.noUDP = time.Hour })
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a", "b")
	testkit.Eventually(t, "refusals of what waited", func() bool { return len(g.w.refusals()) == 2 })
	for i := range 50 {
		g.send(fmt.Sprintf("10.0.0.1:%d", 6000+i), "203.0.113.1:1000", "c")
	}
	why := g.w.refusals()
	if len(why) != 52 || why[0] != flow.RefusePort || why[51] != flow.RefusePort {
		t.Errorf("%d refusals: %v", len(why), why)
	}
	if p := g.w.refused[0]; string(p.Payload) != "a" || string(p.Head) != "head" || p.Src.String() != "10.0.0.1:5000" ||
		p.Dst.String() != "203.0.113.1:1000" {
		t.Errorf("refused %+v", p)
	}
	if s := g.Stats(); s.MappingsNow != 0 || srv.Stats().Requests != 1 {
		t.Errorf("%d mappings are left, the server was asked %d times", s.MappingsNow, srv.Stats().Requests)
	}
	testkit.Eventually(t, "the flow's line", func() bool { return len(g.log.lines("state=refused")) == 1 })
	if n := len(g.log.lines("does not work for UDP")); n != 1 {
		t.Errorf("%d lines", n)
	}
	srv.SetFault(nil) // and later it has UDP
	g.policy.Load().order[0].refuseUntil.Store(g.now())
	one := newFar(t, srv, "203.0.113.1:1000")
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "again")
	if got, _ := one.read(); got != "again" {
		t.Error(got)
	}
}

// The control connection ends: the mapping stays, what is sent meanwhile waits, and the app notices nothing.
func TestUDPReassociation(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	one := newFar(t, srv, "203.0.113.1:1000")
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	one.read()
	for i, end := range []sockstest.End{sockstest.FIN, sockstest.RST} {
		var gate sync.WaitGroup
		gate.Add(1)
		srv.SetFault(func(sockstest.Request) sockstest.Fault { gate.Wait(); return sockstest.Fault{} })
		srv.CutAll(end)
		testkit.Eventually(t, "the loss to be noticed", func() bool { return g.Stats().Reassociations == uint64(i+1) })
		g.send("10.0.0.1:5000", "203.0.113.1:1000", "meanwhile")
		gate.Done()
		got, ext := one.read()
		if got != "meanwhile" {
			t.Error(got)
		}
		back := fmt.Sprintf("back %d", i)
		one.write(ext, back)
		g.wantPacket(t, "203.0.113.1:1000", "10.0.0.1:5000", back)
	}
	if s := g.Stats(); s.Mappings != 1 || s.Refused != 0 || s.QueueFull != 0 {
		t.Errorf("%+v", s)
	}
}

// manualUpstream has its associations opened by the test.
type manualUpstream struct {
	mu   sync.Mutex
	asks []manualAsk
}

type manualAsk struct {
	ctx    context.Context
	sink   func([]flow.Packet)
	done   func(relay.PacketLink, error)
	closed func(error)
}

func (u *manualUpstream) upstream(name string) Upstream {
	return &fakeUpstream{
		name: name,
		open: func(ctx context.Context, sink func([]flow.Packet), done func(relay.PacketLink, error), closed func(error)) {
			u.mu.Lock()
			defer u.mu.Unlock()
			u.asks = append(u.asks, manualAsk{ctx, sink, done, closed})
		},
	}
}

func (u *manualUpstream) ask(t testing.TB, i int) manualAsk {
	t.Helper()
	testkit.Eventually(t, fmt.Sprintf("association %d to be asked for", i), func() bool { return u.count() > i })
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.asks[i]
}

func (u *manualUpstream) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.asks)
}

func (u *manualUpstream) endAll() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, a := range u.asks {
		context.AfterFunc(a.ctx, func() { a.done(nil, a.ctx.Err()) })
	}
}

func TestUDPQueueBounds(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, nil)
	for i := range 200 {
		g.send("10.0.0.1:5000", "203.0.113.1:1000", fmt.Sprint(i))
	}
	big := string(bytes.Repeat([]byte("x"), 60000))
	for range 5 {
		g.send("10.0.0.1:5001", "203.0.113.1:1000", big)
	}
	a, b := &fakeLink{}, &fakeLink{}
	u.ask(t, 0).done(a, nil)
	u.ask(t, 1).done(b, nil)
	testkit.Eventually(t, "what waited to be sent", func() bool { return a.count() == queueLen && b.count() == 2 })
	if first, last := string(a.sent[0].Payload), string(a.sent[queueLen-1].Payload); first != "136" || last != "199" {
		t.Errorf("sent %s to %s: the newest should have stayed", first, last)
	}
	if s := g.Stats(); s.QueueFull != 136+3 {
		t.Errorf("%d were counted as lost, %d were", s.QueueFull, 136+3)
	}
	g.each(func(table *mappings) {
		if table.queued != 0 {
			t.Errorf("%d bytes are said to wait", table.queued)
		}
	})
}

// The verdict is taken for each destination inside a mapping.
func TestUDPVerdictForEachDestination(t *testing.T) {
	testkit.CheckLeaks(t)
	var p, q manualUpstream
	began := time.Now()
	g := newRig(t, Config{
		Upstreams: []Upstream{p.upstream("p"), q.upstream("q")}, Default: "p",
		Rules: []Rule{
			mustRule(t, "dst 203.0.113.2 reject"),
			mustRule(t, "dst 203.0.113.3 drop"),
			mustRule(t, "dst 203.0.113.4 via q"),
		},
	}, nil)
	var burst []flow.Packet
	for i, dst := range []string{"203.0.113.1:1", "203.0.113.2:1", "203.0.113.3:1", "203.0.113.4:1", "224.0.0.1:1",
		"203.0.113.1:1", "203.0.113.1:2", "[ff02::1]:5", "203.0.113.4:0"} {
		burst = append(burst, datagram("10.0.0.1:5000", dst, fmt.Sprint(i)))
	}
	g.HandlePackets(burst)
	lp, lq := &fakeLink{}, &fakeLink{}
	p.ask(t, 0).done(lp, nil)
	q.ask(t, 0).done(lq, nil)
	testkit.Eventually(t, "the datagrams", func() bool { return lp.count() == 3 && lq.count() == 1 })
	g.HandlePackets(burst) // and now on open links: one Send for the run of two
	if lp.count() != 6 || lq.count() != 2 || lp.calls != 3 || lq.calls != 2 {
		t.Errorf("p: %d datagrams in %d calls, q: %d in %d", lp.count(), lp.calls, lq.count(), lq.calls)
	}
	if s := g.Stats(); s.Mappings != 1 || s.Refused != 8 || s.Dropped != 2 {
		t.Errorf("%+v", s)
	}
	testkit.Eventually(t, "one line for what is rejected", func() bool { return len(g.log.lines("state=rejected")) > 0 })
	if n, most := len(g.log.lines("state=rejected")), 1+int(time.Since(began).Seconds()); n > most {
		t.Errorf("%d lines for what is rejected", n)
	}
	for _, r := range g.Rules() {
		if r.Hits == 0 {
			t.Errorf("rule %q has no hits", r.Rule)
		}
	}
}

// The proxy is down: retries with back-off, datagrams first wait and then are refused, and one log line.
func TestUDPProxyDown(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, err := sockstest.Listen("tcp", "127.0.0.1:0", sockstest.WithRedirectsOnly())
	if err != nil {
		t.Fatal(err)
	}
	addr := srv.Addr().String()
	srv.Close()
	_, client := newClient(t, "socks5://"+addr, socks.Options{})
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, func(r *Router) {
		r.retryFirst, r.retryMax = 10*time.Millisecond, 40*time.Millisecond
	})
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	testkit.Eventually(t, "the refusal of what waited", func() bool { return len(g.w.refusals()) == 1 })
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "b")
	if why := g.w.refusals(); len(why) != 2 || why[1] != flow.RefuseNet {
		t.Errorf("%v", why)
	}
	if f := g.Flows(); len(f) != 1 || f[0].State == "open" {
		t.Errorf("%+v", f)
	}
	if srv, err = sockstest.Listen("tcp", addr, sockstest.WithRedirectsOnly()); err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	one := newFar(t, srv, "203.0.113.1:1000")
	testkit.Eventually(t, "the association", func() bool { return g.Flows()[0].State == "open" })
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "c")
	got, back := one.read()
	if got != "c" {
		t.Error(got)
	}
	if n := len(g.log.lines("works again for UDP")); n != 0 {
		t.Errorf("it is said to work before an answer came: %d lines", n)
	}
	one.write(back, "answer")
	testkit.Eventually(t, "both lines", func() bool {
		return len(g.log.lines("does not work for UDP")) == 1 && len(g.log.lines("works again for UDP")) == 1
	})
	if s := g.Stats(); s.Mappings != 1 {
		t.Errorf("%+v", s)
	}
	g.Close() // before the server
}

// Associations are opened so many at a time; those whose mapping has ended are not opened at all.
func TestUDPPendingLimit(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Limits: Limits{Associations: 2}}, nil)
	for i := range 5 {
		g.send(fmt.Sprintf("10.0.0.1:%d", 5000+i), "203.0.113.1:1000", "a")
	}
	u.ask(t, 1)
	testkit.Never(t, 50*time.Millisecond, "more than two were asked for at a time", func() bool { return u.count() != 2 })
	g.HandleUnreachable(netip.MustParseAddrPort("10.0.0.1:5002"))
	u.ask(t, 0).done(&fakeLink{}, nil)
	link := &fakeLink{}
	u.ask(t, 2).done(link, nil)
	testkit.Eventually(t, "the fourth to be served", func() bool { return link.count() == 1 })
	g.HandleUnreachable(netip.MustParseAddrPort("10.0.0.1:5003"))
	testkit.Eventually(t, "its link to be closed", link.isClosed)
	u.endAll()
}

// A link that fails before it was handed over, or is handed over too late, is closed.
func TestUDPOddEnds(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(
		t,
		Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"},
		func(r *Router) { r.retryFirst = time.Millisecond },
	)
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	first := u.ask(t, 0)
	first.closed(nil)
	link := &fakeLink{}
	first.done(link, nil)
	testkit.Eventually(t, "the dead link to be closed", link.isClosed)
	second := u.ask(t, 1)
	g.HandleUnreachable(netip.MustParseAddrPort("10.0.0.1:5000"))
	late := &fakeLink{}
	second.done(late, nil)
	testkit.Eventually(t, "the late link to be closed", late.isClosed)
	first.closed(nil) // says it twice
	g.send("10.0.0.1:5001", "203.0.113.1:1000", "a")
	third := u.ask(t, 2)
	u.endAll()
	g.Close()
	if third.ctx.Err() == nil {
		t.Error("a try that is pending at the end is not cancelled")
	}
}

func TestUDPDirect(t *testing.T) {
	testkit.CheckLeaks(t)
	_, d, _ := newProxy(t, socks.Options{})
	marked := 0
	u := NewDirect(d, func(fd int) error { marked++; return nil })
	loop, err := relay.NewLoop(relay.Config{})
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() { _ = loop.Run(context.Background()); close(over) }()
	defer func() { loop.Close(); <-over }()
	got := make(chan string, 4)
	var link relay.PacketLink
	u.OpenPackets(t.Context(), loop, func(p []flow.Packet) {
		for _, p := range p {
			got <- p.Src.String() + " " + string(p.Payload)
		}
	}, func(l relay.PacketLink, e error) { link, err = l, e }, nil)
	if err != nil || marked != 1 {
		t.Fatal(err, marked)
	}
	defer link.Close()
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		c, err := net.ListenPacket("udp", host+":0")
		if err != nil {
			t.Logf("no %s here: %v", host, err)
			continue
		}
		defer c.Close()
		f := &far{c, t}
		if n, err := link.Send([]flow.Packet{datagram("10.0.0.1:1", c.LocalAddr().String(), "hello")}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		s, from := f.read()
		f.write(from, s+" you")
		select {
		case s := <-got:
			if want := c.LocalAddr().String() + " hello you"; s != want {
				t.Errorf("got %q, want %q", s, want)
			}
		case <-time.After(testkit.Patience):
			t.Fatal("nothing came back")
		}
	}
}

// Port 53 is answered over TCP through the proxy, from the address that was asked.
func TestUDPResolver(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 1024)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			b[4] |= 0x80 // QR
			_, _ = c.Write(b[:n])
		}
	}()
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(netip.MustParseAddrPort("192.0.2.53:53"), l.Addr().(*net.TCPAddr).AddrPort())
	g := newRig(
		t,
		Config{
			Upstreams: []Upstream{NewSOCKS("p", client)},
			Default:   "p",
			Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.53:53"))},
		},
		nil,
	)
	wire := []byte("\x00\x4d\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01")
	g.send("10.0.0.1:5000", "10.255.255.1:53", string(wire), "garbage")
	wire[2] |= 0x80
	g.wantPacket(t, "10.255.255.1:53", "10.0.0.1:5000", string(wire))
	if s := g.Stats(); s.Mappings != 0 || s.DNS.Answered != 1 || s.DNS.Malformed != 1 {
		t.Errorf("%+v", s)
	}
}
