package route

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A thousand reloads, beside streams that are opened and carry bytes and datagrams of several sources: no stream is cut,
// none that a rule lets pass is refused, no datagram is lost, and none goes where its rule does not send it. The rules
// change between those that look at the destination alone and those that need more, so that the caches change, too.
func TestThousandReloads(t *testing.T) {
	testkit.CheckLeaks(t)
	far := echo(t)
	srv, _, c := newProxy(t, socks.Options{})
	srv.Redirect(netip.MustParseAddrPort(farEnd), far)
	var u manualUpstream
	owners := &fakeOwners{}
	for _, src := range []string{"10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"} {
		owners.set(src, flow.Owner{Known: true, UID: 1})
	}
	ups := []Upstream{NewSOCKS("tcp", c), u.upstream("udp")}
	sets := [][]Rule{
		parseRules(t, "port 9 reject", "proto udp via udp"),
		parseRules(t, "port 9 reject", "proto udp user 1 via udp"),
		parseRules(t, "src 10.9.0.0/16 drop", "port 9 reject", "proto udp via udp"),
		parseRules(t, "name no.example drop", "port 9 reject", "proto udp via udp"),
	}
	g := newRig(t, Config{Upstreams: ups, Default: "tcp", Owners: owners, Rules: sets[0]}, nil)

	// Streams that are open all the time.
	var open []*fakeStream
	for i := range 10 {
		q := newRequest(fmt.Sprintf("10.0.0.9:%d", i+1), farEnd)
		g.HandleStream(q)
		open = append(open, opened(t, q))
	}
	load := beginLoad(t, g, &u)
	want := ""
	for i := range 1000 {
		if err := g.Reload(Policy{Upstreams: ups, Default: "tcp", Rules: sets[i%len(sets)]}); err != nil {
			t.Fatal(err)
		}
		testkit.Pace(time.Millisecond)
		if i%100 == 0 {
			want += fmt.Sprintf("%d;", i)
			for _, s := range open {
				s.send(fmt.Sprintf("%d;", i), false)
			}
		}
	}
	load.end()

	for i, s := range open {
		testkit.Eventually(t, "the echo of all bytes", func() bool { got, _ := s.received(); return got == want })
		s.mu.Lock()
		if s.aborted {
			t.Errorf("stream %d was cut", i)
		}
		s.mu.Unlock()
	}
	load.check(t)
}

// reloadLoad is what comes beside reloads: bursts of datagrams from three sources, of which one is refused, and new
// connections.
type reloadLoad struct {
	g        *rig
	burst    []flow.Packet
	links    []*fakeLink // of the sources
	bursts   int
	requests []*fakeRequest
	end      func()
}

// beginLoad hands over the first burst, and then more from a goroutine, until end is called.
func beginLoad(t *testing.T, g *rig, u *manualUpstream) *reloadLoad {
	t.Helper()
	l := &reloadLoad{g: g, bursts: 1, burst: []flow.Packet{
		packet("10.0.0.1:1", "203.0.113.1:1000", "x"), packet("10.0.0.2:1", "203.0.113.1:1000", "x"),
		packet("10.0.0.3:1", "203.0.113.2:1000", "x"), packet("10.0.0.1:1", "203.0.113.1:9", "no"),
	}}
	g.HandlePackets(l.burst)
	l.links = []*fakeLink{u.link(t, 0), u.link(t, 1), u.link(t, 2)}
	testkit.Eventually(t, "the links", func() bool { return g.Stats().Pending == 0 })
	ctx, stop := context.WithCancel(context.Background())
	var reader sync.WaitGroup
	l.end = func() { stop(); reader.Wait() }
	reader.Go(func() { // the frame reader
		for ctx.Err() == nil {
			g.HandlePackets(l.burst)
			l.bursts++
			if l.bursts%10 == 0 && len(l.requests) < 300 {
				q := newRequest(fmt.Sprintf("10.0.1.1:%d", len(l.requests)+1), farEnd)
				l.requests = append(l.requests, q)
				g.HandleStream(q)
			}
			testkit.Pace(50 * time.Microsecond)
		}
	})
	return l
}

// check wants all connections to be there, and all datagrams to have gone where they should.
func (l *reloadLoad) check(t *testing.T) {
	t.Helper()
	for _, q := range l.requests {
		testkit.Eventually(t, "a connection that was asked for meanwhile", func() bool {
			_, why, s := q.outcome()
			if len(why) > 0 {
				t.Fatalf("refused with %v", why)
			}
			return s != nil
		})
	}
	testkit.Eventually(t, "every datagram", func() bool {
		return l.links[0].count() == l.bursts && l.links[1].count() == l.bursts && l.links[2].count() == l.bursts
	})
	s := l.g.Stats()
	if s.Dropped != 0 || s.QueueFull != 0 || s.Refused != uint64(l.bursts) || s.Reassociations != 0 {
		t.Errorf("%+v", s)
	}
	if l.bursts < 200 || len(l.requests) < 20 {
		t.Errorf("that was no load: %d bursts, %d connections", l.bursts, len(l.requests))
	}
	t.Logf("%d bursts, %d connections meanwhile", l.bursts, len(l.requests))
}
