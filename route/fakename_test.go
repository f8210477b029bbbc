package route

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// newPool is a pool that holds 256 names, whose addresses may be given to others a moment later.
func newPool(t *testing.T) *dns.Pool {
	t.Helper()
	p, err := dns.NewPool(dns.PoolConfig{V4: netip.MustParsePrefix("198.18.0.0/23"), V6: flow.Pool6, TTL: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func at(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

// namedUpstream tells dialed what it is asked for, and reaches far: the proxy knows where a name leads.
type namedUpstream struct {
	Upstream
	far    netip.AddrPort
	dialed chan Dest
}

func (u namedUpstream) DialStream(ctx context.Context, l *relay.Loop, d Dest, done func(loop.Socket, error)) {
	u.dialed <- d
	u.Upstream.DialStream(ctx, l, Dest{Addr: u.far}, done)
}

// TestStreamByName: a flow to a fake address of either family reaches the proxy as a name, rules see the name, and the address
// stays with its name for as long as the flow lives.
func TestStreamByName(t *testing.T) {
	testkit.CheckLeaks(t)
	far := echo(t)
	srv, _, client := newProxy(t, socks.Options{})
	pool := newPool(t)
	dialed := make(chan Dest, 4)
	up := namedUpstream{NewSOCKS("p", client), far, dialed}
	srv.Redirect(far, far)
	g := newRig(t, Config{
		Upstreams: []Upstream{up}, Default: "p", Pool: pool, Fake: true, Rules: []Rule{mustRule(t, "name .bad.example reject")},
	}, nil)
	v4, v6, _ := pool.Give([]byte("www.example.com"))
	for _, dst := range []netip.Addr{v4, v6} {
		q := newRequest(appEnd, at(dst, 443))
		g.HandleStream(q)
		if d := <-dialed; d.Name != "www.example.com" || d.Addr.Port() != 443 {
			t.Errorf("the upstream was asked for %+v", d)
		}
		var s *fakeStream
		testkit.Eventually(t, "the grant", func() bool { _, _, s = q.outcome(); return s != nil })
		if all := g.Flows(); len(all) != 1 || all[0].Host != "www.example.com" || all[0].Dst != netip.AddrPortFrom(dst, 443) {
			t.Errorf("the flows are %+v", all)
		}
		if held := pool.Stats().Held; held != 1 {
			t.Errorf("%d addresses are held while the flow lives", held)
		}
		for i := range 600 { // more names than there are addresses
			pool.Give([]byte{'n', byte('a' + i/26/26), byte('a' + i/26%26), byte('a' + i%26)})
		}
		if name, ok := pool.AppendName(nil, dst); !ok || string(name) != "www.example.com" {
			t.Errorf("the address stands for %q while a flow uses it", name)
		}
		s.send("hello", true)
		testkit.Eventually(t, "the echo and FIN", func() bool { b, fin := s.received(); return b == "hello" && fin })
		testkit.Eventually(t, "the end", func() bool { return g.Stats().StreamsNow == 0 })
		testkit.Eventually(t, "the release", func() bool { return pool.Stats().Held == 0 })
	}
	testkit.Eventually(t, "lines with the name", func() bool { return len(g.log.lines(`host=www.example.com`)) == 2 })

	bad, _, _ := pool.Give([]byte("a.bad.example"))
	refused(t, g, at(bad, 443), flow.RefuseReset)    // by the rule
	refused(t, g, "198.18.0.9:443", flow.RefuseHost) // it never stood for a name
	if len(dialed) > 0 {
		t.Errorf("the upstream was asked for %+v", <-dialed)
	}
	if held := pool.Stats().Held; held != 0 {
		t.Errorf("%d addresses are held in the end", held)
	}
}

// refused says that a flow to dst is refused for this reason.
func refused(t *testing.T, g *rig, dst string, want flow.Refusal) {
	t.Helper()
	q := newRequest(appEnd, dst)
	g.HandleStream(q)
	var why []flow.Refusal
	testkit.Eventually(t, "the refusal", func() bool { _, why, _ = q.outcome(); return len(why) > 0 })
	if why[0] != want {
		t.Errorf("%s is refused by %v, want %v", dst, why[0], want)
	}
}

// TestStreamByNameInTheRequest: the proxy is asked with the name, by ATYP 3.
func TestStreamByNameInTheRequest(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(5) })
	pool := newPool(t)
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", Pool: pool}, nil)
	v4, _, _ := pool.Give([]byte("www.example.com"))
	refused(t, g, at(v4, 443), flow.RefuseReset)
	r := srv.Requests()
	if len(r) != 1 || r[0].Dst.Name != "www.example.com" || r[0].Dst.Port != 443 {
		t.Errorf("the proxy was asked for %+v", r)
	}
	testkit.Eventually(t, "the release", func() bool { return pool.Stats().Held == 0 })
}
