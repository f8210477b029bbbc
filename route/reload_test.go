package route

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A connection through a proxy that stays lives, one through a proxy that is gone is reset, one that waits for its answer
// is refused; new ones go by the new rules.
func TestReloadStreams(t *testing.T) {
	testkit.CheckLeaks(t)
	far := echo(t)
	var ups []Upstream
	var srvs []*sockstest.Server
	for _, name := range []string{"a", "b", "c"} {
		srv, _, c := newProxy(t, socks.Options{})
		srv.Redirect(netip.MustParseAddrPort(farEnd), far)
		ups, srvs = append(ups, NewSOCKS(name, c)), append(srvs, srv)
	}
	held := make(chan func(int, error), 1)
	slow := &fakeUpstream{name: "slow", dial: func(ctx context.Context, _ Dest, done func(int, error)) {
		context.AfterFunc(ctx, func() { done(-1, ctx.Err()) })
		held <- done
	}}
	g := newRig(t, Config{
		Upstreams: append(ups[:2:2], slow), Default: "a",
		Rules: []Rule{mustRule(t, "port 81 via slow"), mustRule(t, "dst 203.0.113.0/25 port 80 via b")},
	}, nil)
	dial := func() *fakeStream {
		q := newRequest(appEnd, farEnd)
		g.HandleStream(q)
		return opened(t, q)
	}
	viaB := dial()
	waits := newRequest(appEnd, "203.0.113.1:81")
	g.HandleStream(waits)
	<-held

	// b goes, a stays, c comes.
	if err := g.Reload(Policy{Upstreams: []Upstream{ups[2], ups[0]}, Default: "c"}); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, "the reset", func() bool { viaB.mu.Lock(); defer viaB.mu.Unlock(); return viaB.aborted })
	if why := refusal(t, waits); why != flow.RefuseReset {
		t.Errorf("refused with %v", why)
	}
	viaC := dial()
	if n := len(srvs[2].Requests()); n != 1 {
		t.Errorf("the new proxy has %d requests", n)
	}
	// What is wrong changes nothing.
	takesNothing(t, g, Policy{Upstreams: ups[:1], Default: "nobody"},
		Policy{Upstreams: ups[:1], Rules: []Rule{mustRule(t, "via b")}},
		Policy{Upstreams: ups, Default: "a", Resolvers: []dns.Resolver{dns.OverTCP(far)}})
	viaC.send("still here", true)
	testkit.Eventually(t, "the echo", func() bool { got, fin := viaC.received(); return got == "still here" && fin })
	if got := g.Upstreams(); len(got) != 2 || got[0].Name != "c" {
		t.Errorf("%+v", got)
	}
	testkit.Eventually(t, "both lines", func() bool {
		return len(g.log.lines("no longer configured")) >= 1 && g.Stats().StreamsNow == 0
	})
	g.Close()
	if err := g.Reload(Policy{Upstreams: ups, Default: "a"}); !errors.Is(err, errNotRunning) {
		t.Error(err)
	}
}

// takesNothing wants policies that are wrong to be refused.
func takesNothing(t *testing.T, g *rig, wrong ...Policy) {
	t.Helper()
	for _, bad := range wrong {
		if err := g.Reload(bad); err == nil {
			t.Error("taken")
		}
	}
}

// A mapping outlives its upstream: the next datagram goes by another one, from the same mapping.
func TestReloadMappings(t *testing.T) {
	testkit.CheckLeaks(t)
	links := map[string]*fakeLink{}
	up := func(name string) Upstream {
		links[name] = &fakeLink{}
		return &fakeUpstream{
			name: name,
			open: func(_ context.Context, _ func([]flow.Packet), done func(relay.PacketLink, error), _ func(error)) {
				done(links[name], nil)
			},
		}
	}
	a, b := up("a"), up("b")
	g := newRig(t, Config{Upstreams: []Upstream{a, b}, Default: "a"}, nil)
	g.send(appEnd, farEnd, "one")
	testkit.Eventually(t, "a's datagram", func() bool { return links["a"].count() == 1 })
	if err := g.Reload(Policy{Upstreams: []Upstream{a, b}, Default: "b"}); err != nil { // a stays, unused
		t.Fatal(err)
	}
	g.send(appEnd, farEnd, "two")
	testkit.Eventually(t, "b's datagram", func() bool { return links["b"].count() == 1 })
	if links["a"].isClosed() {
		t.Error("a is configured, and its association ended")
	}
	if err := g.Reload(Policy{Upstreams: []Upstream{b}, Default: "b"}); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, "the end of a's association", links["a"].isClosed)
	g.send(appEnd, farEnd, "three")
	testkit.Eventually(t, "b's second datagram", func() bool { return links["b"].count() == 2 })
	if s := g.Stats(); s.Mappings != 1 || s.MappingsNow != 1 {
		t.Errorf("%+v", s)
	}
	if links["b"].isClosed() {
		t.Error("b's association ended")
	}
}

// A Reload or Renew that comes just as Run begins has its resolvers asked: Run neither puts the old ones back nor starts the new
// ones twice.
func TestReloadAsRunBegins(t *testing.T) {
	testkit.CheckLeaks(t)
	loop, err := relay.NewLoop(relay.Config{})
	if err != nil {
		t.Fatal(err)
	}
	loopOver := make(chan struct{})
	go func() { _ = loop.Run(context.Background()); close(loopOver) }()
	defer func() { loop.Close(); <-loopOver }()
	one := []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.1:53"))}
	r, err := New(Config{
		Loops: []*relay.Loop{loop}, Upstreams: []Upstream{&fakeUpstream{name: "a"}}, Default: "a", Resolvers: one,
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Attach(func(int) flow.PacketWriter { return &fakeWriter{} })
	next, err := r.port53.newServer(r.policy.Load(), &resolverSet{resolvers: one}, &Split{})
	if err != nil {
		t.Fatal(err)
	}
	r.reload.Lock()
	ended := make(chan error, 1)
	go func() { ended <- r.Run(context.Background()) }()
	testkit.Eventually(t, "Run to begin", r.ran.Load)
	r.port53.start(next) // as Reload does
	r.reload.Unlock()
	testkit.Eventually(t, "Run to end", func() bool { r.cancel(); return len(ended) == 1 })
	if r.port53.server.Load() != next {
		t.Error("Run has put the old resolvers back")
	}
}

// The resolvers' connections end with the upstream that they go by.
func TestReloadDNS(t *testing.T) {
	testkit.CheckLeaks(t)
	dials := make(chan string, 16)
	up := func(name string) Upstream {
		return &fakeUpstream{name: name, dial: func(_ context.Context, d Dest, done func(int, error)) {
			dials <- name + " " + d.String()
			done(-1, errors.New("no"))
		}}
	}
	one, two := netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("192.0.2.2:53")
	a, b := up("a"), up("b")
	g := newRig(t, Config{Upstreams: []Upstream{a}, Default: "a", Resolvers: []dns.Resolver{dns.OverTCP(one)}}, nil)
	question := strings.Join([]string{"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00", "\x01x\x00", "\x00\x01\x00\x01"}, "")
	ask := func(want string) {
		t.Helper()
		testkit.Eventually(t, "a dial of "+want, func() bool {
			g.send(appEnd, "198.51.100.53:53", question)
			select {
			case got := <-dials:
				return got == want
			default:
				return false
			}
		})
	}
	ask("a 192.0.2.1:53")
	asked := g.Stats().DNS.Questions
	if err := g.Reload(Policy{Upstreams: []Upstream{b}, Default: "b", Resolvers: []dns.Resolver{dns.OverTCP(two)}}); err != nil {
		t.Fatal(err)
	}
	if got := g.Stats().DNS.Questions; got < asked || asked == 0 {
		t.Errorf("%d questions, and before %d", got, asked)
	}
	ask("b 192.0.2.2:53")
	old := g.port53.server.Load()
	if err := g.Reload(Policy{Upstreams: []Upstream{b}, Default: "b", Rules: []Rule{mustRule(t, "port 25 reject")},
		Resolvers: []dns.Resolver{dns.OverTCP(two)}}); err != nil {
		t.Fatal(err)
	}
	if g.port53.server.Load() != old {
		t.Error("another resolver, and nothing that concerns it changed")
	}
	takesResolvers(t, g, Policy{Upstreams: []Upstream{b}, Default: "b", Rules: []Rule{mustRule(t, "port 25 reject")}}, two)
	if rules := g.Rules(); !slices.ContainsFunc(rules, func(r RuleInfo) bool { return r.Rule == "port 25 reject" }) {
		t.Errorf("%+v", rules)
	}
}

// takesResolvers changes what else a resolver is asked by, which is taken, too.
func takesResolvers(t *testing.T, g *rig, p Policy, at netip.AddrPort) {
	t.Helper()
	for _, change := range []func(*Policy){
		func(p *Policy) { p.RelayDNS = true },
		func(p *Policy) { p.ResolverCAs = x509.NewCertPool() },
		func(p *Policy) { p.Resolvers[0].Kind = dns.TLS },
	} {
		old := g.port53.server.Load()
		p := p
		p.Resolvers = []dns.Resolver{dns.OverTCP(at)}
		change(&p)
		if err := g.Reload(p); err != nil {
			t.Fatal(err)
		}
		if d := g.port53.server.Load(); d == old || d.Relays() != p.RelayDNS {
			t.Errorf("%+v is not taken", p)
		}
	}
}

// Another network: associations and resolvers' connections are made anew, mappings stay, and nobody has to send first.
func TestRenew(t *testing.T) {
	testkit.CheckLeaks(t)
	opened := make(chan *fakeLink, 4)
	dials := make(chan string, 16)
	a := &fakeUpstream{name: "a",
		dial: func(_ context.Context, d Dest, done func(int, error)) {
			dials <- d.String()
			done(-1, errors.New("no"))
		},
		open: func(_ context.Context, _ func([]flow.Packet), done func(relay.PacketLink, error), _ func(error)) {
			l := &fakeLink{}
			opened <- l
			done(l, nil)
		}}
	g := newRig(
		t,
		Config{
			Upstreams: []Upstream{a},
			Default:   "a",
			Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.1:53"))},
		},
		nil,
	)
	g.send(appEnd, farEnd, "one")
	first := <-opened
	testkit.Eventually(t, "the datagram", func() bool { return first.count() == 1 })
	old := g.port53.server.Load()
	g.Renew()
	<-opened
	testkit.Eventually(t, "the end of the first association", first.isClosed)
	if s := g.Stats(); s.Mappings != 1 || s.MappingsNow != 1 || s.Reassociations != 1 {
		t.Errorf("%+v", s)
	}
	if g.port53.server.Load() == old {
		t.Error("the same connections to resolvers")
	}
	g.Close()
	g.Renew() // nothing happens
}

// A zero means the same to SetUDP as to New: the default.
func TestSetUDPDefaults(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := relay.NewLoop(relay.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, err := New(Config{Loops: []*relay.Loop{l}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	udp := &r.shards[0].udp
	life, most := udp.life, udp.most
	if life != DefaultUDPTimeout || most < 16 || most > DefaultMappings {
		t.Errorf("at the start: %v, %d mappings", life, most)
	}
	r.SetUDP(time.Minute, 9)
	if udp.life != time.Minute || udp.most != 9 {
		t.Errorf("set: %v, %d mappings", udp.life, udp.most)
	}
	if r.SetUDP(0, 0); udp.life != life || udp.most != most {
		t.Errorf("back to the defaults: %v, %d mappings", udp.life, udp.most)
	}
}
