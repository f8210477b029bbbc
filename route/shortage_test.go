package route

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// When this host has run out of descriptors, programs get no error that speaks of the far end: TCP tries again, datagrams
// wait. It is said once, and the proxy is not blamed.
func TestShortage(t *testing.T) {
	testkit.CheckLeaks(t)
	short := fmt.Errorf("cannot make a socket: %w", syscall.EMFILE)
	tries := 0 // of Run alone
	link := &fakeLink{}
	u := &fakeUpstream{
		name: "p",
		dial: func(_ context.Context, _ Dest, done func(int, error)) { done(-1, short) },
		open: func(_ context.Context, _ func([]flow.Packet), done func(relay.PacketLink, error), _ func(error)) {
			if tries++; tries <= 3*refuseAfter {
				done(nil, short)
				return
			}
			done(link, nil)
		},
	}
	g := newRig(
		t,
		Config{Upstreams: []Upstream{u}, Default: "p"},
		func(r *Router) { r.retryFirst, r.retryMax = time.Millisecond, time.Millisecond },
	)
	if s := g.Shortage(); s.Times != 0 {
		t.Errorf("%+v", s)
	}
	for range 20 {
		q := newRequest(appEnd, farEnd)
		g.HandleStream(q)
		if why := refusal(t, q); why != flow.RefuseLater {
			t.Fatalf("refused by %v", why)
		}
	}
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	testkit.Eventually(t, "the datagram", func() bool { return link.count() == 1 })
	if n := len(g.w.refusals()); n != 0 {
		t.Errorf("%d datagrams were refused", n)
	}
	testkit.Eventually(t, "a line", func() bool { return len(g.log.lines("run out")) > 0 })
	if n := len(g.log.lines("run out")); n != 1 {
		t.Errorf("%d lines", n)
	}
	if s := g.Shortage(); s.Times != 20+3*refuseAfter || s.Why != short.Error() || time.Since(s.Last) > time.Minute {
		t.Errorf("%+v", s)
	}
	for _, up := range g.Upstreams() {
		if up.TCPDown || up.UDPDown {
			t.Errorf("the proxy is said to be down: %+v", up)
		}
	}
}
