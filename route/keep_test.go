package route

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

const keptApp = "10.0.0.1:5000"

// keeper keeps the mapping of keptApp and remembers what was told about it.
type keeper struct {
	mu  sync.Mutex
	all []Outer
	end func()
}

func (g *rig) keep(upstream string) *keeper {
	k := &keeper{}
	app := netip.MustParseAddrPort(keptApp)
	k.end = g.KeepUDP(g.of(app.Port()).index, app, upstream, func(o Outer) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.all = append(k.all, o)
	})
	return k
}

func (k *keeper) told() []Outer {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.all)
}

// wait waits until the last thing that was told is ok.
func (k *keeper) wait(t *testing.T, what string, ok func(Outer) bool) (last Outer) {
	t.Helper()
	testkit.Eventually(t, what, func() bool {
		all := k.told()
		if len(all) > 0 {
			last = all[len(all)-1]
		}
		return len(all) > 0 && ok(last)
	})
	return last
}

func isKnown(o Outer) bool { return o.At.IsValid() }

// fastProbes shortens the pauses of probes and looks.
func fastProbes(r *Router) {
	r.probeFirst, r.probeEvery, r.probeAgain, r.sweepEvery = 20*time.Millisecond, time.Hour, time.Hour, 5*time.Millisecond
}

// openProxy starts a SOCKS server that reaches loopback.
func openProxy(t *testing.T, f sockstest.Fault) (*sockstest.Server, Upstream) {
	t.Helper()
	srv, err := sockstest.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return f })
	_, c := newClient(t, srv.URL(), socks.Options{})
	return srv, NewSOCKS("p", c)
}

// worldOf returns the port at which the only association is reached.
func worldOf(t *testing.T, srv *sockstest.Server) uint16 {
	t.Helper()
	all, ok := srv.WaitAssociations(1, testkit.Patience)
	if !ok {
		t.Fatalf("%d associations", len(all))
	}
	return all[0].World(false).Port()
}

// The proxy is asked to send to our own sockets. A stranger reaches the app, which has sent nothing, and no datagram of the
// probe does.
func TestKeepBeside(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, up := openProxy(t, sockstest.Fault{})
	g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "p"}, fastProbes)
	k := g.keep("p")
	o := k.wait(t, "the outer endpoint", isKnown)
	if want := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), worldOf(t, srv)); o.At != want {
		t.Fatalf("%+v, want %v", o, want)
	}
	stranger := newFar(t, srv, "198.51.100.9:9")
	stranger.write(net.UDPAddrFromAddrPort(o.At), "hello")
	g.wantPacket(t, "198.51.100.9:9", keptApp, "hello")
	if got := g.w.packets(); len(got) != 1 {
		t.Errorf("the app got %d datagrams, want one: %q", len(got), got)
	}

	g.HandleUnreachable(netip.MustParseAddrPort(keptApp)) // the program is not there yet
	srv.Associations()[0].Cut(sockstest.FIN)
	next := k.wait(t, "another outer endpoint", func(n Outer) bool { return isKnown(n) && n.At != o.At })
	if next.At.Port() != worldOf(t, srv) {
		t.Errorf("after the end of the association: %v, want port %d", next.At, worldOf(t, srv))
	}
	if !slices.Contains(k.told(), Outer{}) {
		t.Errorf("it was not told that the old endpoint is gone: %+v", k.told())
	}
	k.end()
	testkit.Eventually(t, "the mapping to be like others", func() bool { return keptNow(g) == 0 })
}

// keptNow returns the number of kept mappings.
func keptNow(g *rig) (n int) {
	g.each(func(table *mappings) {
		for _, m := range table.all {
			if m.kept != nil {
				n++
			}
		}
	})
	return n
}

// Without a common outer port nothing is told, and neither a proxy without UDP nor a missing upstream is probed.
func TestKeepOddServers(t *testing.T) {
	for _, tt := range []struct {
		name, up string
		fault    sockstest.Fault
		ok       func(Outer) bool
	}{
		{"another port for each", "p", sockstest.Fault{VaryUDP: true}, func(o Outer) bool {
			return o.Err == errVaries && o.Cannot
		}},
		{"nothing comes", "p", sockstest.Fault{DropUDP: true}, func(o Outer) bool { return o.Err == errSilent && !o.Cannot }},
		{"no UDP", "p", sockstest.Reply(7), func(o Outer) bool { return o.Err == errNoUDP && o.Cannot }},
		{"reply 1", "p", sockstest.Reply(1), func(o Outer) bool { return o.Err == errNoLink && !o.Cannot }},
		{"no upstream", "q", sockstest.Fault{}, func(o Outer) bool { return o.Err != nil && !o.Cannot }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			testkit.CheckLeaks(t)
			_, up := openProxy(t, tt.fault)
			g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "p"}, fastProbes)
			k := g.keep(tt.up)
			k.wait(t, "the outcome", tt.ok)
			k.end()
			if n := len(g.w.packets()); n != 0 {
				t.Errorf("the app got %d datagrams", n)
			}
		})
	}
}

// stunServer answers Binding requests that arrive at f: it sees the address 203.0.113.1.
func (f *far) stunServer(shift uint16) {
	b := make([]byte, 1500)
	for {
		n, from, err := f.ReadFrom(b)
		if err != nil {
			return
		}
		if n == stunHeader && binary.BigEndian.Uint16(b) == stunRequest {
			port := from.(*net.UDPAddr).AddrPort().Port() + shift
			_, _ = f.WriteTo(
				stunReply(stunID(b[4:stunHeader]), netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), port)),
				from,
			)
		}
	}
}

func stunReply(id stunID, at netip.AddrPort) []byte {
	b := append([]byte{1, 1, 0, 12}, id[:]...)
	b = append(b, 0, stunXORed, 0, 8, 0, stunFamilyV4)
	b = binary.BigEndian.AppendUint16(b, at.Port()^binary.BigEndian.Uint16(id[:]))
	ip := at.Addr().As4()
	for i := range ip {
		b = append(b, ip[i]^id[i])
	}
	return b
}

// The answers of two servers of STUN are compared, and the app sees none of them.
func TestKeepSTUN(t *testing.T) {
	for _, tt := range []struct {
		name  string
		shift uint16
		fault sockstest.Fault
		ok    func(Outer) bool
	}{
		{"equal", 0, sockstest.Fault{}, func(o Outer) bool { return o.At.IsValid() }},
		{"different", 1, sockstest.Fault{}, func(o Outer) bool { return o.Err == errVaries && o.Cannot }},
		{"a port for each", 0, sockstest.Fault{VaryUDP: true}, func(o Outer) bool { return o.Err == errVaries }},
		{"silence", 0, sockstest.Fault{DropUDP: true}, func(o Outer) bool { return o.Err == errNoSTUN }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			testkit.CheckLeaks(t)
			srv, up := openProxy(t, tt.fault)
			cfg := Config{Upstreams: []Upstream{up}, Default: "p"}
			var servers []socks.Addr
			for i, at := range []string{"198.51.100.1:3478", "198.51.100.2:3478"} {
				f := newFar(t, srv, at)
				go f.stunServer(uint16(i) * tt.shift)
				servers = append(servers, socks.AddrFrom(netip.MustParseAddrPort(at)))
			}
			g := newRig(t, cfg, fastProbes)
			g.SetSTUN(servers)
			o := g.keep("p").wait(t, "the outcome", tt.ok)
			if o.At.IsValid() && o.At != netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), worldOf(t, srv)) {
				t.Errorf("%v, want port %d", o.At, worldOf(t, srv))
			}
			if n := len(g.w.packets()); n != 0 {
				t.Errorf("the app got %d datagrams", n)
			}
		})
	}
}

// askedLink is a link whose datagrams the test answers.
type askedLink struct {
	fakeLink
	asked chan flow.Packet
}

func (l *askedLink) Send(pkts []flow.Packet) (int, error) {
	for _, p := range pkts {
		l.asked <- clonePacket(p)
	}
	return len(pkts), nil
}

// A lost question is asked again; forged answers are ignored and are the app's; a late answer is not. Three probes in a row
// must fail before what is known no longer counts.
func TestKeepLostAndForged(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	server := netip.MustParseAddrPort("198.51.100.1:3478")
	cfg := Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}
	g := newRig(t, cfg, func(r *Router) {
		fastProbes(r)
		r.probeEvery, r.probeAgain = time.Millisecond, time.Millisecond
	})
	g.SetSTUN([]socks.Addr{socks.AddrFrom(server)})
	k := g.keep("p")
	link := &askedLink{asked: make(chan flow.Packet, 1000)}
	ask := u.ask(t, 0)
	ask.done(link, nil)
	<-link.asked // lost
	question := <-link.asked
	if question.Dst != server || question.Src.String() != keptApp {
		t.Errorf("a question from %v to %v", question.Src, question.Dst)
	}
	outer, forged := netip.MustParseAddrPort("203.0.113.1:1111"), netip.MustParseAddrPort("203.0.113.6:666")
	answer := func(payload []byte) { ask.sink([]flow.Packet{{Src: server, Payload: payload}}) }
	answer(stunReply(newStunID(), forged))
	answer(stunReply(stunID(question.Payload[4:]), outer))
	answer(stunReply(stunID(question.Payload[4:]), outer))
	if o := k.wait(t, "the outer endpoint", func(o Outer) bool { return o.At.IsValid() }); o.At != outer {
		t.Errorf("%v, want %v", o.At, outer)
	}
	if got := g.w.packets(); len(got) != 1 || parseStun(got[0].Payload) != forged {
		t.Errorf("the app got %d datagrams: %v", len(got), got)
	}
	k.wait(t, "the end after lost probes", func(o Outer) bool { return o.Err == errNoSTUN })
	if n := len(link.asked); n < probeLost*probeTries-3 {
		t.Errorf("it is given up after %d questions", n)
	}
}

// A kept mapping is not evicted, and does not end when it is idle or when the socket is gone; when it is no longer kept, it does.
func TestKeepLives(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", UDPTimeout: time.Millisecond}, fastProbes)
	k := g.keep("p")
	u.ask(t, 0).done(nil, errors.New("broken"))
	k.wait(t, "the failure", func(o Outer) bool { return o.Err == errNoLink })
	testkit.Never(t, 50*time.Millisecond, "the mapping has ended", func() bool { return keptNow(g) != 1 })
	second := g.keep("p")
	second.wait(t, "the refusal", func(o Outer) bool { return o.Err == errKeptTwice })
	k.end()
	k.end()
	testkit.Eventually(t, "the end of the mapping", func() bool { return g.Stats().MappingsNow == 0 })
}

// natLink is a link to a NAT of its own, whose only outer endpoint is out.
type natLink struct {
	fakeLink
	out     *net.UDPConn
	refused bool         // a firewall refuses what strangers send
	probes  atomic.Int32 // that have begun
}

func (l *natLink) Beside(n int) (all []*net.UDPConn, reachable bool, err error) {
	l.probes.Add(1)
	for range n {
		c, err := l.local()
		if err != nil {
			return nil, false, err
		}
		all = append(all, c)
	}
	return all, true, nil
}

func (l *natLink) Listen() (*net.UDPConn, error) {
	c, err := l.local()
	if l.refused {
		c.Close()
	}
	return c, err
}

func (l *natLink) local() (*net.UDPConn, error) {
	return net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
}

func (l *natLink) Relay() netip.AddrPort { return netip.MustParseAddrPort("127.0.0.1:1") }

func (l *natLink) Send(pkts []flow.Packet) (int, error) {
	for _, p := range pkts {
		_, _ = l.out.WriteToUDPAddrPort(p.Payload, p.Dst)
	}
	return len(pkts), nil
}

// A stranger's datagram shows whether the outer endpoint is open to all, and the app does not see it.
func TestKeepFilter(t *testing.T) {
	for name, want := range map[string]Filter{"open": FilterOpen, "closed": FilterClosed} {
		t.Run(name, func(t *testing.T) {
			testkit.CheckLeaks(t)
			var u manualUpstream
			g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, func(r *Router) {
				fastProbes(r)
				r.mayProbe = func(netip.Addr) bool { return true }
			})
			link := &natLink{}
			link.out, _ = link.local()
			defer link.out.Close()
			k := g.keep("p")
			ask := u.ask(t, 0)
			if want == FilterOpen {
				go func() {
					b := make([]byte, 1500)
					for {
						n, from, err := link.out.ReadFromUDPAddrPort(b)
						if err != nil {
							return
						}
						ask.sink([]flow.Packet{{Src: from, Payload: b[:n]}})
					}
				}()
			}
			ask.done(link, nil)
			o := k.wait(t, "the filter", func(o Outer) bool { return o.Filter != FilterUnknown })
			if o.Filter != want || o.At.String() != link.out.LocalAddr().String() {
				t.Errorf("%+v, want %v", o, want)
			}
			if n := len(g.w.packets()); n != 0 {
				t.Errorf("the app got %d datagrams", n)
			}
		})
	}
}

// Where nothing could be sent to the outer endpoint, silence tells nothing about it.
func TestKeepFilterRefused(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, func(r *Router) {
		fastProbes(r)
		r.probeFirst, r.probeEvery = time.Millisecond, time.Millisecond
		r.mayProbe = func(netip.Addr) bool { return true }
	})
	link := &natLink{refused: true}
	link.out, _ = link.local()
	defer link.out.Close()
	k := g.keep("p")
	u.ask(t, 0).done(link, nil)
	k.wait(t, "the outer endpoint", isKnown)
	testkit.Eventually(t, "the second probe", func() bool { return link.probes.Load() > 1 })
	if o := k.wait(t, "the outer endpoint", isKnown); o.Filter != FilterUnknown {
		t.Errorf("%+v", o)
	}
}
