package route

import (
	"context"
	"encoding/binary"
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

// familyRig has a proxy that answers a name with a code, and reaches 203.0.113.1:443 and [2001:db8::7]:443, but not
// 203.0.113.2:443, which refuses, nor any other.
func familyRig(
	t *testing.T, code byte, query string, zone map[string]string, rules ...Rule,
) (*rig, *sockstest.Server, *dns.Pool, func() int64) {
	t.Helper()
	srv, d, client := newProxy(t, socks.Options{})
	if query != "" {
		s, err := socks.ParseServer(srv.URL() + query)
		if err != nil {
			t.Fatal(err)
		}
		client = d.Client(s)
	}
	srv.SetFault(func(q sockstest.Request) sockstest.Fault {
		switch {
		case q.Dst.Name != "":
			return sockstest.Reply(code)
		case q.Dst.IP == netip.MustParseAddr("203.0.113.2"):
			return sockstest.Reply(5)
		}
		return sockstest.Fault{}
	})
	e := echo(t)
	srv.Redirect(netip.MustParseAddrPort("203.0.113.1:443"), e)
	srv.Redirect(netip.MustParseAddrPort("[2001:db8::7]:443"), e)
	res, asked := zoneResolver(t, srv, zone)
	pool := newPool(t)
	g := newRig(t, Config{
		Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", Rules: rules,
		Pool: pool, Fake: true, Resolvers: []dns.Resolver{dns.OverTCP(res)},
	}, nil)
	return g, srv, pool, asked.Load
}

// secondTryCases are the cases of TestSecondTry.
var secondTryCases = map[string]struct {
	code    byte
	name    string
	query   string // of the proxy's URL
	rule    string
	granted bool
	why     flow.Refusal
	second  uint64
	asked   int64
	dials   int  // of addresses, where there is more than one for the second try
	lacks   bool // the upstream is known to have no IPv6
}{
	"host unreachable":    {code: 4, name: "both.example", granted: true, second: 1, asked: 2},
	"network unreachable": {code: 3, name: "both.example", granted: true, second: 1, asked: 2},
	"no names":            {code: 8, name: "four.example", granted: true, second: 1, asked: 2},
	"no names, IPv6 only": {code: 8, name: "sixer.example", granted: true, second: 1, asked: 2},
	"IPv4 is dead":        {code: 4, name: "newer.example", granted: true, second: 1, asked: 2, dials: 2},
	"both are dead":       {code: 4, name: "dead.example", why: flow.RefuseHost, second: 1, asked: 2, dials: 2},
	"no IPv6":             {code: 4, name: "newer.example", why: flow.RefuseHost, second: 1, asked: 2, lacks: true},
	"IPv4 only":           {code: 4, name: "four.example", why: flow.RefuseHost, asked: 2},
	"IPv6 only":           {code: 4, name: "six.example", why: flow.RefuseHost, asked: 2},
	"refused":             {code: 5, name: "both.example", why: flow.RefuseReset},
	"general failure":     {code: 1, name: "both.example", why: flow.RefuseReset},
	"not allowed":         {code: 2, name: "both.example", why: flow.RefuseAdmin},
	"refused at last":     {code: 4, name: "closed.example", why: flow.RefuseReset, second: 1, asked: 2},
	"onion":               {code: 4, name: "both.onion", why: flow.RefuseHost},
	"single label":        {code: 4, name: "intranet", why: flow.RefuseHost},
	"Tor":                 {code: 4, name: "both.example", query: "?tor", why: flow.RefuseHost},
	"a fake address":      {code: 4, name: "ours.example", why: flow.RefuseHost, second: 1, asked: 2},
	"a rule for IPv4": {code: 4, name: "newer.example", rule: "dst 203.0.113.0/24 reject", granted: true, second: 1,
		asked: 2},
	"a rule for IPv6": {code: 4, name: "newer.example", rule: "dst 2001:db8::/32 reject", why: flow.RefuseHost, second: 1,
		asked: 2},
	"a rule for both": {code: 4, name: "newer.example", rule: "dst 203.0.113.0/24,2001:db8::/32 reject", why: flow.RefuseHost,
		asked: 2},
}

// TestSecondTry: a name that the server cannot reach is tried again by its IPv4 address, and then by its IPv6 address, if it
// has one of each family.
func TestSecondTry(t *testing.T) {
	zone := map[string]string{
		"both.example": "203.0.113.1", "AAAA both.example": "2001:db8::1", "four.example": "203.0.113.1",
		"closed.example": "203.0.113.2", "AAAA closed.example": "2001:db8::2", "AAAA six.example": "2001:db8::2",
		"ours.example": "198.18.0.1", "AAAA ours.example": "2001:db8::2",
		"newer.example": "203.0.113.7", "AAAA newer.example": "2001:db8::7",
		"dead.example": "203.0.113.7", "AAAA dead.example": "2001:db8::2", "AAAA sixer.example": "2001:db8::7",
	}
	for label, tt := range secondTryCases {
		t.Run(strings.ReplaceAll(label, " ", "-"), func(t *testing.T) {
			testkit.CheckLeaks(t)
			var rules []Rule
			if tt.rule != "" {
				rules = append(rules, mustRule(t, tt.rule))
			}
			g, srv, pool, asked := familyRig(t, tt.code, tt.query, zone, rules...)
			if tt.lacks {
				g.policy.Load().order[0].ipv6.lacking.Store(g.now() + int64(time.Hour))
			}
			fake, _, _ := pool.Give([]byte(tt.name))
			q := newRequest(appEnd, at(fake, 443))
			g.HandleStream(q)
			if tt.granted {
				var s *fakeStream
				testkit.Eventually(t, "the grant", func() bool { _, _, s = q.outcome(); return s != nil })
				s.send("hello", true)
				testkit.Eventually(t, "the echo", func() bool { b, fin := s.received(); return b == "hello" && fin })
			} else if why := refusal(t, q); why != tt.why {
				t.Errorf("refused by %v, want %v", why, tt.why)
			}
			testkit.Eventually(t, "the end", func() bool { return g.Stats().StreamsNow == 0 && pool.Stats().Held == 0 })
			opened := uint64(0)
			if tt.granted {
				opened = 1
			}
			if s := g.Stats(); s.SecondTries != tt.second || s.SecondOpened != opened {
				t.Errorf("%d second tries, %d of them granted; want %d", s.SecondTries, s.SecondOpened, tt.second)
			}
			if n := asked(); n != tt.asked {
				t.Errorf("%d questions went to the resolver, want %d", n, tt.asked)
			}
			far := slices.DeleteFunc(srv.Requests(), func(r sockstest.Request) bool { return r.Dst.Port != 443 })
			if len(far) != 1+max(int(tt.second), tt.dials) {
				t.Errorf("the proxy was asked for %v", far)
			}
		})
	}
}

// TestSecondTryWaits: while the addresses of a name are waited for, the flow ends at once when its app gives up or the Router
// closes, and is refused after a time when no resolver answers.
func TestSecondTryWaits(t *testing.T) {
	for _, end := range []string{"gives up", "closes", "waits"} {
		t.Run(strings.ReplaceAll(end, " ", "-"), func(t *testing.T) {
			testkit.CheckLeaks(t)
			srv, _, client := newProxy(t, socks.Options{})
			srv.SetFault(func(q sockstest.Request) sockstest.Fault {
				if q.Dst.Name != "" {
					return sockstest.Reply(4)
				}
				return sockstest.Silence()
			})
			pool := newPool(t)
			g := newRig(t, Config{
				Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", Pool: pool, Fake: true,
				Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.53:53"))},
			}, nil)
			fake, _, _ := pool.Give([]byte("www.example"))
			q := newRequest(appEnd, at(fake, 443))
			start := time.Now()
			g.HandleStream(q)
			testkit.Eventually(t, "the question", func() bool {
				return slices.ContainsFunc(srv.Requests(), func(r sockstest.Request) bool { return r.Dst.Port == 53 })
			})
			switch end {
			case "gives up":
				q.giveUp()
				testkit.Eventually(t, "the end", func() bool { return g.Stats().StreamsNow == 0 })
				testkit.Eventually(t, "its line", func() bool { return len(g.log.lines("state=cancelled")) == 1 })
			case "closes":
				g.Close()
			case "waits":
				if why := refusal(t, q); why != flow.RefuseHost || time.Since(start) < secondWait {
					t.Errorf("refused by %v after %v", why, time.Since(start))
				}
			}
			if took := time.Since(start); end != "waits" && took >= secondWait {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// hasAAAA asks the Router's own server for IPv6 addresses of a name.
func (g *rig) hasAAAA(t *testing.T, name string) bool {
	t.Helper()
	msg := []byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for l := range strings.SplitSeq(name, ".") {
		msg = append(append(msg, byte(len(l))), l...)
	}
	got := make(chan uint16, 1)
	g.port53.server.Load().Handle(append(msg, 0, 0, 28, 0, 1), netip.AddrPort{}, func(b []byte) {
		got <- binary.BigEndian.Uint16(b[6:])
	})
	return <-got == 1
}

// TestLearnIPv6: names have no IPv6 address while their upstream is known to reach none; others keep theirs, and so do all with
// --ipv6 on.
func TestLearnIPv6(t *testing.T) {
	for name, learn := range map[string]bool{"auto": true, "on": false} {
		t.Run(name, func(t *testing.T) { testLearnIPv6(t, learn) })
	}
}

func testLearnIPv6(t *testing.T, learn bool) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	_, _, other := newProxy(t, socks.Options{})
	var code atomic.Uint32
	code.Store(3)
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(byte(code.Load())) })
	cfg := Config{
		Upstreams: []Upstream{NewSOCKS("p", client), NewSOCKS("o", other)}, Default: "p", Pool: newPool(t), Fake: true,
		Rules: []Rule{
			mustRule(
				t,
				"name o.example via o",
			), mustRule(t, "name some.example port 80 via o"), mustRule(t, "name p.example via p"),
		},
		Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.53:53"))}, LearnFakeIPv6: learn,
	}
	g := newRig(t, cfg, nil)
	dial := func(addrs ...string) {
		for _, a := range addrs {
			q := newRequest(appEnd, a)
			g.HandleStream(q)
			_ = refusal(t, q)
		}
	}
	want := func(when string, has bool) {
		t.Helper()
		has = has || !learn
		for name, want := range map[string]bool{"www.example": has, "p.example": has, "o.example": true, "some.example": true} {
			if got := g.hasAAAA(t, name); got != want {
				t.Errorf("%s: %s has an IPv6 address: %v", when, name, got)
			}
		}
	}
	lacks := func() { dial("[2001:db8::1]:1", "[2001:db8::2]:1", "[2001:db8::3]:1") }
	want("at first", true)
	dial("[2001:db8::1]:1", "[2001:db8::2]:1", "[2001:db8::1]:2", "203.0.113.1:1", "203.0.113.2:1")
	want("after two addresses", true)
	lacks()
	want("after three", false)
	g.Renew()
	want("after a change of the network", true)
	lacks()
	want("again", false)
	if err := g.Reload(Policy{
		Upstreams: cfg.Upstreams, Default: cfg.Default, Rules: cfg.Rules, Resolvers: cfg.Resolvers, Fake: true,
	}); err != nil {
		t.Fatal(err)
	}
	want("after a reload", true)
	lacks()
	code.Store(5)
	dial("[2001:db8::4]:1")
	want("after one was reached", true)
	code.Store(4)
	lacks()
	want("soon after one was reached", true)
}

// TestIPv6Known: what is believed for how long.
func TestIPv6Known(t *testing.T) {
	var k ipv6Known
	addr := func(i byte) netip.Addr { return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: i}) }
	now := int64(time.Hour)
	fail := func(n byte) {
		for i := range n {
			k.learn(addr(i), socks.ReplyHostUnreachable, now)
		}
	}
	fail(lackingAfter - 1)
	now += int64(reachedFor) + 1
	fail(lackingAfter - 1)
	if k.lacks(now) {
		t.Error("failures that are long apart count together")
	}
	fault := &socks.ServerError{Err: socks.ReplyHostUnreachable}
	for _, err := range []error{socks.ReplyGeneralFailure, socks.ErrSilent, context.Canceled, fault} {
		k.learn(addr(9), err, now)
	}
	if k.lacks(now) {
		t.Error("other errors count")
	}
	until := now + int64(lackingFor)
	if !k.learn(addr(9), socks.ReplyAddrTypeNotSupported, now) || !k.lacks(until-1) || k.lacks(until) {
		t.Error("it is not believed for its time")
	}
	if k.learn(addr(1), nil, now); k.lacks(now) {
		t.Error("an address that was reached proves nothing")
	}
	now += int64(reachedFor) - 1
	if fail(lackingAfter); k.lacks(now) {
		t.Error("dead addresses prove something beside one that was reached")
	}
	now++
	if fail(lackingAfter); !k.lacks(now) {
		t.Error("one that was reached counts for too long")
	}
}
