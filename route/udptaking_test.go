package route

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// namesRig has a proxy that finds names in zone, and whose associations have a fault. The resolvers know what resolvers has; nil:
// the proxy refuses them.
type namesRig struct {
	*rig
	srv  *sockstest.Server
	pool *dns.Pool
	t    *testing.T

	moved *atomic.Bool // names are where zone has them with "moved"
}

func newNamesRig(
	t *testing.T, f sockstest.Fault, zone, resolvers map[string]string, change func(*Router), rules ...string,
) *namesRig {
	t.Helper()
	testkit.CheckLeaks(t)
	moved := new(atomic.Bool)
	resolve := func(name string) (netip.Addr, error) {
		if moved.Load() {
			name += " moved"
		}
		if a, ok := zone[name]; ok {
			return netip.ParseAddr(a)
		}
		return netip.Addr{}, errors.New("no such name")
	}
	srv, d, client := newProxy(t, socks.Options{}, sockstest.WithUDPOverTCP(), sockstest.WithResolve(resolve))
	srv.SetFault(func(q sockstest.Request) sockstest.Fault {
		if q.Dst.Port == 53 && resolvers == nil {
			return sockstest.Reply(2)
		}
		return f
	})
	if f.Bound != nil { // stands for UDP over TCP
		f.Bound = nil
		s, err := socks.ParseServer(srv.URL() + "?udp=over-tcp")
		if err != nil {
			t.Fatal(err)
		}
		client = d.Client(s)
	}
	res, _ := zoneResolver(t, srv, resolvers)
	pool := newPool(t)
	cfg := Config{
		Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", Pool: pool, Fake: true,
		Resolvers: []dns.Resolver{dns.OverTCP(res)},
	}
	for _, rule := range rules {
		cfg.Rules = append(cfg.Rules, mustRule(t, rule))
	}
	return &namesRig{newRig(t, cfg, change), srv, pool, t, moved}
}

// give is the fake address of a name.
func (g *namesRig) give(name string, port uint16) string {
	g.t.Helper()
	a, _, ok := g.pool.Give([]byte(name))
	if !ok {
		g.t.Fatal("the pool is empty")
	}
	return at(a, port)
}

func (g *namesRig) wantNamed(n uint64) {
	g.t.Helper()
	if got := g.srv.Stats().UDPNamed; got != n {
		g.t.Errorf("%d datagrams went to names, want %d", got, n)
	}
}

func (g *namesRig) wantTakes(word string) {
	g.t.Helper()
	testkit.Eventually(g.t, "what is known of names: "+word, func() bool { return g.Upstreams()[0].NamesUDP == word })
}

// want reads a datagram and gives where it came from.
func (f *far) want(text string) net.Addr {
	f.t.Helper()
	got, from := f.read()
	if got != text {
		f.t.Errorf("got %q, want %q", got, text)
	}
	return from
}

// none fails if a datagram is there, or comes in a moment.
func (f *far) none() {
	f.t.Helper()
	_ = f.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	b := make([]byte, 100)
	if n, _, err := f.ReadFrom(b); err == nil {
		f.t.Errorf("there is one datagram more: %q", b[:n])
	}
}

const app1 = "10.0.0.1:5000"

var worldZone = map[string]string{
	"one.example": "203.0.113.1", "two.example": "203.0.113.2", "three.example": "203.0.113.3", "dead.example": "203.0.113.8",
}

// TestNamesTaken: behind a proxy that refuses port 53 datagrams go to names. A server that answers from the address is written to
// by that address from then on; strangers are strangers.
func TestNamesTaken(t *testing.T) {
	g := newNamesRig(t, sockstest.Fault{}, worldZone, nil, nil)
	one := newFar(t, g.srv, "203.0.113.1:1000")
	two := newFar(t, g.srv, "203.0.113.2:1001")
	stranger := newFar(t, g.srv, "203.0.113.9:1000")
	other := newFar(t, g.srv, "203.0.113.7:2000")
	fake1, fake2 := g.give("one.example", 1000), g.give("two.example", 1001)
	g.send(app1, fake1, "a1", "a2")
	ext := one.want("a1")
	other.write(ext, "of another port")
	g.wantPacket(t, "203.0.113.7:2000", app1, "of another port")
	one.write(ext, "b1")
	g.wantPacket(t, fake1, app1, "b1")
	one.want("a2") // waited for what is found out, and was not sent before
	one.none()
	testkit.Eventually(t, "the end of doubt", func() bool {
		g.shards[0].udp.mu.Lock()
		defer g.shards[0].udp.mu.Unlock()
		m := g.shards[0].udp.bySrc[netip.MustParseAddrPort(app1)]
		return m == nil || m.waiting(1000, g.now()) == nil
	})
	stranger.write(ext, "from a stranger")
	g.wantPacket(t, "203.0.113.9:1000", app1, "from a stranger")
	g.send(app1, fake1, "a3")
	one.want("a3")
	g.send(app1, fake2, "c1")
	if ext2 := two.want("c1"); ext2.String() != ext.String() {
		t.Errorf("the outer port changed from %v to %v", ext, ext2)
	}
	two.write(ext, "d1")
	g.wantPacket(t, fake2, app1, "d1")
	g.wantTakes("yes")
	if n := g.srv.Stats().UDPNamed; n < 2 || n > 3 { // a2 may have gone to the name
		t.Errorf("%d datagrams went to names", n)
	}
	if n := g.srv.Stats().Associations; n != 1 {
		t.Errorf("there were %d associations", n)
	}
	// What is known holds for other sockets, too: nothing is held any more.
	three := newFar(t, g.srv, "203.0.113.3:1002")
	g.send("10.0.0.1:5001", g.give("three.example", 1002), "e1", "e2")
	three.want("e1")
	three.want("e2")
}

// TestNamesAnswerByName: a server that answers from the name, by UDP and over TCP. Names of one port need not wait for each
// other.
func TestNamesAnswerByName(t *testing.T) {
	for label, f := range map[string]sockstest.Fault{
		"UDP":      {AsName: true},
		"over TCP": {AsName: true, Bound: &sockstest.Addr{}},
	} {
		t.Run(strings.ReplaceAll(label, " ", "-"), func(t *testing.T) {
			g := newNamesRig(t, f, worldZone, nil, nil)
			one := newFar(t, g.srv, "203.0.113.1:1000")
			two := newFar(t, g.srv, "203.0.113.2:1000")
			three := newFar(t, g.srv, "203.0.113.3:1000")
			fake1, fake2, fake3 := g.give("one.example", 1000), g.give("two.example", 1000), g.give("three.example", 1000)
			g.send(app1, fake1, "a1")
			ext := one.want("a1")
			one.write(ext, "b1")
			g.wantPacket(t, fake1, app1, "b1")
			g.wantTakes("yes")
			g.send(app1, fake2, "a2")
			g.send(app1, fake3, "a3")
			two.want("a2")
			three.want("a3")
			three.write(ext, "b3")
			two.write(ext, "b2")
			g.wantPacket(t, fake3, app1, "b3")
			g.wantPacket(t, fake2, app1, "b2")
			g.wantNamed(3)
		})
	}
}

// TestNamesNotTaken: a server that drops datagrams to names is written to by address after two names have shown it, and nothing
// is sent to names any more.
func TestNamesNotTaken(t *testing.T) {
	g := newNamesRig(t, sockstest.Fault{DropNames: true}, worldZone, worldZone, nil)
	one := newFar(t, g.srv, "203.0.113.1:1000")
	two := newFar(t, g.srv, "203.0.113.2:1001")
	three := newFar(t, g.srv, "203.0.113.3:1000")
	fake1, fake2, fake3 := g.give("one.example", 1000), g.give("two.example", 1001), g.give("three.example", 1000)
	g.send(app1, fake1, "a1", "a2")
	g.send(app1, fake2, "a3")
	ext := one.want("a1")
	one.want("a2")
	two.want("a3")
	one.write(ext, "b1")
	two.write(ext, "b3")
	g.wantPacket(t, fake1, app1, "b1")
	g.wantPacket(t, fake2, app1, "b3")
	g.wantTakes("no")
	dropped := g.srv.Stats().UDPDropped
	g.send(app1, fake3, "a4")
	three.want("a4")
	three.write(ext, "b4")
	g.wantPacket(t, fake3, app1, "b4")
	if n := g.srv.Stats().UDPDropped; n != dropped || dropped == 0 {
		t.Errorf("the server dropped %d datagrams, and then %d", dropped, n)
	}
	g.send(app1, g.give("nowhere.example", 1000), "x")
	testkit.Eventually(t, "the refusal", func() bool { return slices.Contains(g.w.refusals(), flow.RefuseHost) })
	one.none()
}

// TestNamesEndAssociation: so is one that ends the association.
func TestNamesEndAssociation(t *testing.T) {
	g := newNamesRig(t, sockstest.Fault{EndUDP: func(a sockstest.Addr) bool { return a.Name != "" }}, worldZone, worldZone, nil)
	one := newFar(t, g.srv, "203.0.113.1:1000")
	two := newFar(t, g.srv, "203.0.113.2:1000")
	three := newFar(t, g.srv, "203.0.113.3:1000")
	for i, f := range []*far{one, two, three} {
		name := []string{"one.example", "two.example", "three.example"}[i]
		fake := g.give(name, 1000)
		g.send(app1, fake, "to "+name)
		f.write(f.want("to "+name), "from "+name)
		g.wantPacket(t, fake, app1, "from "+name)
	}
	g.wantTakes("no")
	if known := g.policy.Load().order[0].names.last.Load().load(g.now()); known != takesEnd {
		t.Errorf("the server is in state %d, want %d", known, takesEnd)
	}
	if n := g.srv.Stats().Associations; n != 3 {
		t.Errorf("there were %d associations, want one for each of two names, and one", n)
	}
}

// TestNamesTakeTurns: behind a proxy that refuses port 53 and answers from addresses a second name of the same port waits until
// the first has answered, or had its time.
func TestNamesTakeTurns(t *testing.T) {
	g := newNamesRig(t, sockstest.Fault{}, worldZone, nil, func(r *Router) {
		r.nameWindow, r.nameDoubt = 400*time.Millisecond, time.Nanosecond
	})
	one, two := newFar(t, g.srv, "203.0.113.1:1000"), newFar(t, g.srv, "203.0.113.2:1000")
	dead, three := newFar(t, g.srv, "203.0.113.8:1000"), newFar(t, g.srv, "203.0.113.3:1000")
	fake1, fake2 := g.give("one.example", 1000), g.give("two.example", 1000)
	g.send(app1, fake1, "a1")
	g.send(app1, fake2, "a2")
	ext := one.want("a1")
	two.none()
	one.write(ext, "b1")
	g.wantPacket(t, fake1, app1, "b1")
	two.want("a2")
	two.write(ext, "b2")
	g.wantPacket(t, fake2, app1, "b2")

	start := time.Now()
	g.send(app1, g.give("dead.example", 1000), "a3")
	g.send(app1, g.give("three.example", 1000), "a4")
	dead.want("a3")
	three.want("a4")
	if d := time.Since(start); d < g.nameWindow {
		t.Errorf("the turn came after %v, want %v", d, g.nameWindow)
	}
	dead.write(ext, "too late")
	three.write(ext, "b4")
	g.wantPacket(t, g.give("three.example", 1000), app1, "too late") // see the comment in udpname.go
	g.wantPacket(t, "203.0.113.3:1000", app1, "b4")
}

// TestNamesAndPeers: an address that a program has written to by itself is never taken for a name.
func TestNamesAndPeers(t *testing.T) {
	g := newNamesRig(t, sockstest.Fault{}, worldZone, nil, nil)
	one, peer := newFar(t, g.srv, "203.0.113.1:1000"), newFar(t, g.srv, "203.0.113.9:1000")
	late := newFar(t, g.srv, "203.0.113.10:1000")
	g.send(app1, "203.0.113.9:1000", "hello")
	ext := peer.want("hello")
	fake := g.give("one.example", 1000)
	g.send(app1, fake, "a1")
	one.want("a1")
	g.send(app1, "203.0.113.10:1000", "hello, too")
	late.want("hello, too")
	peer.write(ext, "of a peer")
	late.write(ext, "of another peer")
	g.wantPacket(t, "203.0.113.9:1000", app1, "of a peer")
	g.wantPacket(t, "203.0.113.10:1000", app1, "of another peer")
	one.write(ext, "b1")
	g.wantPacket(t, fake, app1, "b1")
}

// TestNamesMove: when the address that answered is silent, the name is asked again, and may be somewhere else.
func TestNamesMove(t *testing.T) {
	zone := map[string]string{"one.example": "203.0.113.1", "one.example moved": "203.0.113.2"}
	g := newNamesRig(t, sockstest.Fault{}, zone, nil, func(r *Router) { r.nameSilence = 300 * time.Millisecond })
	one, two := newFar(t, g.srv, "203.0.113.1:1000"), newFar(t, g.srv, "203.0.113.2:1000")
	fake := g.give("one.example", 1000)
	g.send(app1, fake, "a1")
	ext := one.want("a1")
	one.write(ext, "b1")
	g.wantPacket(t, fake, app1, "b1")
	g.moved.Store(true)
	g.send(app1, fake, "a2")
	one.want("a2")
	moved := make(chan string, 1)
	go func() {
		b := make([]byte, 100)
		_ = two.SetReadDeadline(time.Now().Add(testkit.Patience))
		n, _, _ := two.ReadFrom(b)
		moved <- string(b[:n])
	}()
	var got string
	testkit.Eventually(t, "the name's new address", func() bool {
		g.send(app1, fake, "a3")
		select {
		case got = <-moved:
		case <-time.After(20 * time.Millisecond):
		}
		return got == "a3"
	})
	two.write(ext, "b3")
	g.wantPacket(t, fake, app1, "b3")
}

// TestNamesTor: no resolver is asked for a name that goes to a Tor, which has no UDP.
func TestNamesTor(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, d, _ := newProxy(t, socks.Options{})
	srv.SetFault(func(q sockstest.Request) sockstest.Fault {
		if q.Cmd == sockstest.CmdAssociate {
			return sockstest.Reply(7)
		}
		return sockstest.Fault{}
	})
	s, err := socks.ParseServer(srv.URL() + "?tor")
	if err != nil {
		t.Fatal(err)
	}
	res, asked := zoneResolver(t, srv, worldZone)
	pool := newPool(t)
	g := newRig(t, Config{
		Upstreams: []Upstream{NewSOCKS("p", d.Client(s))}, Default: "p", Pool: pool, Fake: true,
		Resolvers: []dns.Resolver{dns.OverTCP(res)},
	}, nil)
	for _, name := range []string{"one.example", "two.example"} {
		before := len(g.w.refusals())
		a, _, _ := pool.Give([]byte(name))
		g.send(app1, at(a, 1000), "x")
		testkit.Eventually(t, "the refusal of "+name, func() bool { return len(g.w.refusals()) > before })
		if why := g.w.refusals()[before]; why != flow.RefusePort {
			t.Errorf("%s is refused by %v", name, why)
		}
	}
	testkit.Never(t, 2*trialAgain, "the resolver was asked", func() bool { return asked.Load() != 0 }) // it would be at once
}

// resolved is whether the resolvers have told this address for a name.
func (g *namesRig) resolved(addr string) bool {
	u := &g.shards[0].udp
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, f := range u.far.byKey {
		if f.addr == netip.MustParseAddr(addr) {
			return true
		}
	}
	return false
}

// TestNamesDisputed: when two unknown addresses answer for a name, neither is taken for it from then on, unless the resolvers
// know which one it is.
func TestNamesDisputed(t *testing.T) {
	for label, resolvers := range map[string]map[string]string{"no-resolver": nil, "resolver": worldZone} {
		t.Run(label, func(t *testing.T) {
			g := newNamesRig(t, sockstest.Fault{}, worldZone, resolvers, func(r *Router) { r.nameDoubt = testkit.Patience })
			one, forger := newFar(t, g.srv, "203.0.113.1:1000"), newFar(t, g.srv, "203.0.113.9:1000")
			fake := g.give("one.example", 1000)
			g.send(app1, fake, "a1")
			ext := one.want("a1")
			forger.write(ext, "forged")
			g.wantPacket(t, fake, app1, "forged")
			from := "203.0.113.1:1000"
			if resolvers != nil {
				from = fake
				testkit.Eventually(t, "the resolver's answer", func() bool { return g.resolved("203.0.113.1") })
			}
			one.write(ext, "b1")
			g.wantPacket(t, from, app1, "b1")
			g.send(app1, fake, "a2")
			one.want("a2")
			forger.none()
			forger.write(ext, "forged again")
			g.wantPacket(t, "203.0.113.9:1000", app1, "forged again")
			one.write(ext, "b2")
			g.wantPacket(t, from, app1, "b2")
		})
	}
}
