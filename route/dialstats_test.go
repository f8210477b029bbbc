package route

import (
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestDialStats(t *testing.T) {
	var d dialStats
	d.grant(0)
	if d.latency.Load() == 0 {
		t.Error("a grant at once looks like no grant")
	}
	d = dialStats{}
	for _, took := range []time.Duration{80, 80, 160} {
		d.grant(took)
	}
	if n, got := d.granted.Load(), d.latency.Load(); n != 3 || got != 90 {
		t.Errorf("%d grants, %d ns", n, got)
	}
}

// The list of upstreams has what was granted, what failed, and how long it took.
func TestUpstreamInfo(t *testing.T) {
	testkit.CheckLeaks(t)
	far := echo(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(netip.MustParseAddrPort(farEnd), far)
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	q := newRequest(appEnd, farEnd)
	g.HandleStream(q)
	testkit.Eventually(t, "the grant", func() bool { ok, _, _ := q.outcome(); return ok })
	if u := g.Upstreams()[0]; u.Granted != 1 || u.Failed != 0 || u.Latency <= 0 || u.Latency > testkit.Patience {
		t.Errorf("%+v", u)
	}
	srv.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Garbage() })
	refusal(t, func() *fakeRequest { q := newRequest(appEnd, farEnd); g.HandleStream(q); return q }())
	if u := g.Upstreams()[0]; u.Granted != 1 || u.Failed != 1 || !u.TCPDown {
		t.Errorf("%+v", u)
	}
}
