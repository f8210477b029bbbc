package route

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
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
	var sets [][]Rule
	for _, texts := range [][]string{
		{"port 9 reject", "proto udp via udp"},
		{"port 9 reject", "proto udp user 1 via udp"},
		{"src 10.9.0.0/16 drop", "port 9 reject", "proto udp via udp"},
		{"name no.example drop", "port 9 reject", "proto udp via udp"},
	} {
		var rules []Rule
		for _, s := range texts {
			rules = append(rules, mustRule(t, s))
		}
		sets = append(sets, rules)
	}
	g := newRig(t, Config{Upstreams: ups, Default: "tcp", Owners: owners, Rules: sets[0]}, nil)

	// Streams that are open all the time.
	var open []*fakeStream
	for i := range 10 {
		q := newRequest(fmt.Sprintf("10.0.0.9:%d", i+1), farEnd)
		g.HandleStream(q)
		var s *fakeStream
		testkit.Eventually(t, "a connection", func() bool { _, _, s = q.outcome(); return s != nil })
		open = append(open, s)
	}
	burst := []flow.Packet{
		packet("10.0.0.1:1", "203.0.113.1:1000", "x"), packet("10.0.0.2:1", "203.0.113.1:1000", "x"),
		packet("10.0.0.3:1", "203.0.113.2:1000", "x"), packet("10.0.0.1:1", "203.0.113.1:9", "no"),
	}
	g.HandlePackets(burst)
	links := []*fakeLink{u.link(t, 0), u.link(t, 1), u.link(t, 2)}
	testkit.Eventually(t, "the links", func() bool { return g.Stats().Pending == 0 })

	// The frame reader.
	ctx, stop := context.WithCancel(context.Background())
	var reader sync.WaitGroup
	bursts, asked := 1, 0
	var requests []*fakeRequest
	var ports atomic.Int64
	reader.Go(func() {
		for ctx.Err() == nil {
			g.HandlePackets(burst)
			bursts++
			if bursts%10 == 0 && asked < 300 {
				asked++
				q := newRequest(fmt.Sprintf("10.0.1.1:%d", ports.Add(1)), farEnd)
				requests = append(requests, q)
				g.HandleStream(q)
			}
			testkit.Pace(50 * time.Microsecond)
		}
	})
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
	stop()
	reader.Wait()

	for i, s := range open {
		testkit.Eventually(t, "the echo of all bytes", func() bool { got, _ := s.received(); return got == want })
		s.mu.Lock()
		if s.aborted {
			t.Errorf("stream %d was cut", i)
		}
		s.mu.Unlock()
	}
	for _, q := range requests {
		testkit.Eventually(t, "a connection that was asked for meanwhile", func() bool {
			_, why, s := q.outcome()
			if len(why) > 0 {
				t.Fatalf("refused with %v", why)
			}
			return s != nil
		})
	}
	testkit.Eventually(t, "every datagram", func() bool {
		return links[0].count() == bursts && links[1].count() == bursts && links[2].count() == bursts
	})
	s := g.Stats()
	if s.Dropped != 0 || s.QueueFull != 0 || s.Refused != uint64(bursts) || s.Reassociations != 0 {
		t.Errorf("%+v", s)
	}
	if bursts < 200 || len(requests) < 20 {
		t.Errorf("that was no load: %d bursts, %d connections", bursts, len(requests))
	}
	t.Logf("%d bursts, %d connections meanwhile", bursts, len(requests))
}
