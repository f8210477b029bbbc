package route

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

type fakeSockets struct {
	mu    sync.Mutex
	has   map[netip.AddrPort]bool
	err   error // of what is not found
	tired bool  // the list cannot be had
	asks  int
	lists int
	hook  func() // while it is asked
}

var errTired = errors.New("netlink is tired")

func (s *fakeSockets) Exists(_ flow.Proto, src, _ netip.AddrPort) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asks++
	if s.hook != nil {
		s.hook()
	}
	if s.has[src] {
		return true, nil
	}
	return false, s.err
}

func (s *fakeSockets) Forwards() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Is(s.err, flow.ErrForwarded)
}

func (s *fakeSockets) BoundUDP(visit func(netip.AddrPort)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lists++
	if s.tired {
		return errTired
	}
	for at := range s.has {
		visit(at)
	}
	return nil
}

// set says which sockets there are.
func (s *fakeSockets) set(all ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.has = map[netip.AddrPort]bool{}
	for _, at := range all {
		s.has[netip.MustParseAddrPort(at)] = true
	}
}

// age makes what the apps sent last so much older.
func (g *rig) age(by time.Duration) {
	g.each(func(table *mappings) {
		for _, m := range table.all {
			m.lastUp -= int64(by)
		}
	})
}

func TestUDPLife(t *testing.T) {
	testkit.CheckLeaks(t)
	const pinnedFor = 50 * time.Millisecond
	var u manualUpstream
	pinned := netip.MustParseAddrPort("10.0.0.1:5001")
	sockets := &fakeSockets{has: map[netip.AddrPort]bool{pinned: true}}
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Sockets: sockets}, func(r *Router) {
		r.sweepEvery = 10 * time.Millisecond
		for _, s := range r.shards {
			s.udp.life, s.udp.shortLife, s.udp.pinned = time.Hour, 100*time.Millisecond, pinnedFor
		}
		r.epoch = r.epoch.Add(-2 * time.Hour) // for age
	})
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	g.send("10.0.0.1:5001", "203.0.113.1:1000", "a")
	g.send("10.0.0.1:5002", "203.0.113.1:53", "a")
	links := []*fakeLink{{}, {}, {}}
	for i := range links {
		u.ask(t, i).done(links[i], nil)
	}
	testkit.Eventually(t, "the DNS mapping to end", func() bool { return g.Stats().MappingsNow == 2 })
	for _, f := range g.Flows() {
		if f.Dst.Port() == 53 {
			t.Errorf("not the DNS mapping: %+v", f)
		}
	}
	begin := time.Now()
	g.age(time.Hour)
	testkit.Eventually(t, "the mapping without a socket to end", func() bool { return g.Stats().MappingsNow == 1 })
	testkit.Never(t, 300*time.Millisecond, "the mapping that has a socket ended", func() bool {
		f := g.Flows()
		return len(f) != 1 || f[0].Src != pinned
	})
	sockets.mu.Lock()
	if most := 6 + int(time.Since(begin)/pinnedFor); sockets.asks > most { // three of them at the new mappings
		t.Errorf("the sockets were asked about %d times, more than %d", sockets.asks, most)
	}
	delete(sockets.has, pinned)
	sockets.mu.Unlock()
	testkit.Eventually(t, "the last one to end", func() bool { return g.Stats().MappingsNow == 0 })
	for i, l := range links {
		testkit.Eventually(t, fmt.Sprint("link ", i, " to be closed"), l.isClosed)
	}
	if s := g.Stats(); s.MappingsExpired != 3 {
		t.Errorf("%+v", s)
	}
}

// A datagram that comes while the socket is asked about keeps the mapping.
func TestUDPLifeRace(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	sockets := &fakeSockets{}
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Sockets: sockets}, func(r *Router) {
		r.sweepEvery = 10 * time.Millisecond
		for _, s := range r.shards {
			s.udp.life = 100 * time.Millisecond
		}
	})
	sockets.mu.Lock()
	sockets.hook = func() { g.send("10.0.0.1:5000", "203.0.113.1:1000", "a") }
	sockets.mu.Unlock()
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	u.ask(t, 0).done(&fakeLink{}, nil)
	testkit.Eventually(t, "three questions", func() bool {
		sockets.mu.Lock()
		defer sockets.mu.Unlock()
		return sockets.asks >= 3
	})
	if s := g.Stats(); s.Mappings != 1 || s.MappingsExpired != 0 {
		t.Errorf("%+v", s)
	}
}

// A connected socket refuses strangers by ICMP: that must not end its mapping.
func TestUDPUnreachableByConnected(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	app := netip.MustParseAddrPort("10.0.0.1:5000")
	sockets := &fakeSockets{has: map[netip.AddrPort]bool{app: true}}
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Sockets: sockets}, nil)
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	u.ask(t, 0).done(&fakeLink{}, nil)
	begin := time.Now()
	for range 100 {
		g.HandleUnreachable(app)
	}
	asked := func() int { sockets.mu.Lock(); defer sockets.mu.Unlock(); return sockets.asks }
	testkit.Eventually(t, "a look at the socket", func() bool { return asked() > 1 }) // the first was at the new mapping
	testkit.Pace(20 * time.Millisecond)                                               // more looks would come by now
	if s := g.Stats(); s.MappingsNow != 1 || asked() > 2+int(time.Since(begin)/time.Duration(askGone)) {
		t.Errorf("%d mappings, %d looks at the socket", s.MappingsNow, asked())
	}
	sockets.mu.Lock()
	delete(sockets.has, app)
	sockets.mu.Unlock()
	g.mapping(5000, func(m *mapping) { m.askedGone = 0 })
	g.HandleUnreachable(app)
	testkit.Eventually(t, "the mapping to end", func() bool { return g.Stats().MappingsNow == 0 })
}

// A burst mixes app endpoints: each gets its own mapping and association.
func TestUDPMixedBurst(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, nil)
	var burst []flow.Packet
	for i := range 6 {
		burst = append(burst, datagram(fmt.Sprintf("10.0.0.1:%d", 5000+i/2%2), "203.0.113.1:1000", fmt.Sprint(i)))
	}
	g.HandlePackets(burst)
	a, b := &fakeLink{}, &fakeLink{}
	u.ask(t, 0).done(a, nil)
	u.ask(t, 1).done(b, nil)
	testkit.Eventually(t, "the datagrams", func() bool { return a.count() == 4 && b.count() == 2 })
	for _, l := range []*fakeLink{a, b} {
		for _, p := range l.sent {
			if p.Src != l.sent[0].Src {
				t.Errorf("one association carries %v and %v", p.Src, l.sent[0].Src)
			}
		}
	}
}

func TestUDPUnreachableAndEviction(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Limits: Limits{Mappings: 3}}, nil)
	links := []*fakeLink{{}, {}, {}, {}}
	for i := range 3 {
		g.send(fmt.Sprintf("10.0.0.1:%d", 5000+i), "203.0.113.1:1000", "a")
		u.ask(t, i).done(links[i], nil)
	}
	g.send("10.0.0.1:5009", "203.0.113.1:1000", "a")
	if s := g.Stats(); s.MappingsFull != 1 || s.MappingsNow != 3 {
		t.Errorf("all are at work: %+v", s)
	}
	g.age(10 * time.Second) // but the first one has just heard something
	g.mapping(5000, func(m *mapping) { m.lastDown.Store(g.now()) })
	g.send("10.0.0.1:5009", "203.0.113.1:1000", "a")
	u.ask(t, 3).done(links[3], nil)
	testkit.Eventually(t, "the second link to be closed", links[1].isClosed)
	if s := g.Stats(); s.MappingsEvicted != 1 || links[0].isClosed() {
		t.Errorf("%+v", s)
	}
	g.HandleUnreachable(netip.MustParseAddrPort("10.0.0.1:5000"))
	g.HandleUnreachable(netip.MustParseAddrPort("10.0.0.1:5001")) // gone already
	testkit.Eventually(t, "the first link to be closed", links[0].isClosed)
	u.ask(t, 0).sink([]flow.Packet{datagram("203.0.113.1:1000", "10.0.0.1:5000", "late")})
	if len(g.w.packets()) != 0 {
		t.Error("delivered to a mapping that is gone")
	}
	testkit.Eventually(t, "the lines", func() bool {
		return len(g.log.lines("state=evicted")) == 1 && len(g.log.lines("state=unreachable")) == 1
	})
}

// What only comes down keeps a mapping too.
func TestUDPLifeByAnswers(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, func(r *Router) {
		r.sweepEvery = 10 * time.Millisecond
		for _, s := range r.shards {
			s.udp.life = time.Hour
		}
		r.epoch = r.epoch.Add(-2 * time.Hour) // for age
	})
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a", "b")
	ask := u.ask(t, 0)
	ask.done(&fakeLink{}, nil)
	ask.sink([]flow.Packet{datagram("203.0.113.1:1000", "10.0.0.1:5000", "x")})
	g.age(time.Hour)
	testkit.Never(t, 200*time.Millisecond, "the mapping ended", func() bool { return g.Stats().MappingsNow != 1 })
	g.mapping(5000, func(m *mapping) { m.lastDown.Add(-int64(time.Hour)) })
	testkit.Eventually(t, "the end", func() bool { return g.Stats().MappingsNow == 0 })
}

// A server that grants associations and ends them at once is asked less and less often; one that had lived is made
// again without delay.
func TestUDPFlapping(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, func(r *Router) {
		r.retryFirst, r.retryMax, r.livedLong, r.quickEnd = 20*time.Millisecond, time.Hour, time.Hour, 0
	})
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	begin := time.Now()
	for i := range 5 {
		a := u.ask(t, i)
		a.done(&fakeLink{}, nil)
		a.closed(nil)
	}
	a := u.ask(t, 5)
	if d := time.Since(begin); d < (20+40+80+160+320)*time.Millisecond {
		t.Errorf("asked again 5 times within %v", d)
	}
	a.done(&fakeLink{}, nil)
	testkit.Eventually(t, "the link", func() bool { return g.Flows()[0].State == "open" })
	g.mapping(5000, func(m *mapping) {
		m.assocs[0].opened -= int64(time.Hour)
		m.assocs[0].failures = 12 // were they not forgotten, it would take more than a minute
	})
	a.closed(nil)
	u.ask(t, 6).done(&fakeLink{}, nil)
}
