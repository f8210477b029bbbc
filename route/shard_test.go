package route

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// testShards is how many shards, and loops, the rigs have.
var testShards = 1

// TestMain runs all tests with one shard and again with two; with -short only with two.
func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		testShards = 2
		os.Exit(m.Run())
	}
	code := m.Run()
	if flag.Lookup("test.fuzz").Value.String() == "" && flag.Lookup("test.bench").Value.String() == "" {
		testShards = 2
		code = max(code, m.Run())
	}
	os.Exit(code)
}

// of is the shard of an app's port.
func (g *rig) of(port uint16) *shard { return g.shards[int(port)%len(g.shards)] }

// HandleStream is called by the frame reader of the port's shard.
func (g *rig) HandleStream(req flow.StreamRequest) {
	g.Router.HandleStream(g.of(req.Flow().Src.Port()).index, req)
}

// HandlePackets gives each shard its datagrams.
func (g *rig) HandlePackets(pkts []flow.Packet) {
	for _, s := range g.shards {
		var mine []flow.Packet
		for _, p := range pkts {
			if g.of(p.Src.Port()) == s {
				mine = append(mine, p)
			}
		}
		g.Router.HandlePackets(s.index, mine)
	}
}

// HandleUnreachable is called by the frame reader of the port's shard.
func (g *rig) HandleUnreachable(app netip.AddrPort) {
	g.Router.HandleUnreachable(g.of(app.Port()).index, app, netip.AddrPort{})
}

// each calls f with each shard's mappings, under their lock.
func (g *rig) each(f func(t *mappings)) {
	for _, s := range g.shards {
		s.udp.mu.Lock()
		f(&s.udp)
		s.udp.mu.Unlock()
	}
}

// mapping gives f the mapping of a port, under its lock.
func (g *rig) mapping(port uint16, f func(m *mapping)) {
	s := g.of(port)
	s.udp.mu.Lock()
	defer s.udp.mu.Unlock()
	for _, m := range s.udp.all {
		if m.src.Port() == port {
			f(m)
		}
	}
}

// TestShardsAreApart: each port has its own shard's writers and loops, from the SYN or the first datagram on, and the limits are
// those of all shards together.
func TestShardsAreApart(t *testing.T) {
	testkit.CheckLeaks(t)
	for _, loops := range []int{1, 3, 5} {
		t.Run(fmt.Sprint(loops, " loops"), func(t *testing.T) {
			var u manualUpstream
			g := newShardRig(
				t,
				Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Limits: Limits{Mappings: 4}},
				3,
				loops,
			)
			if len(g.shards) != 3 {
				t.Fatalf("%d shards", len(g.shards))
			}
			used := map[any]int{}
			for _, s := range g.shards {
				for _, l := range s.loops {
					used[l]++
				}
			}
			if len(used) != loops {
				t.Errorf("%d of %d loops are used", len(used), loops)
			}
			for i := range 4 {
				src := fmt.Sprintf("10.0.0.1:%d", 5000+i)
				g.HandlePackets([]flow.Packet{packet(src, "203.0.113.1:1000", "x")})
				a := u.ask(t, i)
				a.done(&fakeLink{}, nil)
				a.sink([]flow.Packet{packet("203.0.113.1:1000", src, "y")})
			}
			for _, s := range g.shards {
				got := g.ws[s.index].packets()
				for _, p := range got {
					if g.of(p.Dst.Port()) != s {
						t.Errorf("the writer of shard %d has a datagram to %v", s.index, p.Dst)
					}
				}
				if len(got) == 0 {
					t.Errorf("nothing went by the writer of shard %d", s.index)
				}
			}
			g.HandlePackets([]flow.Packet{packet("10.0.0.1:5100", "203.0.113.1:1000", "x")})
			if s := g.Stats(); s.MappingsFull != 1 || s.MappingsNow != 4 {
				t.Errorf("%d mappings, %d were too many", s.MappingsNow, s.MappingsFull)
			}
			// The one that is idle longest goes, whatever its shard is.
			g.mapping(5002, func(m *mapping) {
				m.lastUp -= 2 * evictIdle
				m.lastDown.Add(-2 * evictIdle)
			})
			g.HandlePackets([]flow.Packet{packet("10.0.0.1:5100", "203.0.113.1:1000", "x")})
			u.ask(t, 4).done(&fakeLink{}, nil)
			if s := g.Stats(); s.MappingsEvicted != 1 || s.MappingsNow != 4 {
				t.Errorf("%d mappings, %d were evicted", s.MappingsNow, s.MappingsEvicted)
			}
			g.mapping(5002, func(*mapping) { t.Error("another mapping was evicted") })
		})
	}
}

// TestHits: what the shards decided is counted together.
func TestHits(t *testing.T) {
	testkit.CheckLeaks(t)
	g := newShardRig(t, Config{Rules: []Rule{mustRule(t, "port 9 drop"), mustRule(t, "port 10 drop")}}, 3, 3)
	for i := range 30 {
		g.HandlePackets([]flow.Packet{packet(fmt.Sprintf("10.0.0.1:%d", 5000+i), "203.0.113.1:10", "x")})
		g.HandleStream(newRequest(fmt.Sprintf("10.0.0.1:%d", 5000+i), "203.0.113.1:9"))
	}
	if rs := g.Rules(); rs[0].Hits != 30 || rs[1].Hits != 30 || rs[2].Hits != 0 {
		t.Errorf("%+v", rs)
	}
}

// TestShardsFlowsLimit: the limit of flows is that of all shards together.
func TestShardsFlowsLimit(t *testing.T) {
	testkit.CheckLeaks(t)
	var n atomic.Int64
	u := &fakeUpstream{name: "p", dial: func(ctx context.Context, _ Dest, done func(int, error)) {
		n.Add(1)
		context.AfterFunc(ctx, func() { done(-1, ctx.Err()) })
	}}
	g := newShardRig(t, Config{Upstreams: []Upstream{u}, Default: "p", Limits: Limits{Flows: 7}}, 3, 3)
	for i := range 20 {
		g.HandleStream(newRequest(fmt.Sprintf("10.0.0.1:%d", 5000+i), farEnd))
	}
	if s := g.Stats(); s.StreamsNow != 7 || s.StreamsFull != 13 || n.Load() != 7 {
		t.Errorf("%d flows, %d were too many, %d dials", s.StreamsNow, s.StreamsFull, n.Load())
	}
}
