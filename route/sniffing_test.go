package route

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// clientHello is what a program says first that wants name by TLS.
func clientHello(t testing.TB, name string) string {
	t.Helper()
	ours, theirs := net.Pipe()
	got := make([]byte, 4096)
	go func() {
		_ = tls.Client(theirs, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	}()
	n, err := ours.Read(got)
	if err != nil {
		t.Fatal(err)
	}
	ours.Close()
	theirs.Close()
	return string(got[:n])
}

func httpGet(name string) string { return "GET / HTTP/1.1\r\nHost: " + name + "\r\n\r\n" }

// sniffRig has the upstreams a, the default, b and direct, which refuse each dial and tell it.
type sniffRig struct {
	*rig
	dialed chan string
}

func newSniffRig(t *testing.T, cfg Config, sniff *Sniff, rules ...string) *sniffRig {
	t.Helper()
	s := &sniffRig{dialed: make(chan string, 10)}
	for _, name := range []string{"a", "b", DirectName} {
		up := &fakeUpstream{name: name}
		up.dial = func(_ context.Context, d Dest, done func(int, error)) {
			s.dialed <- name + " " + d.String()
			done(-1, socks.ReplyHostUnreachable)
		}
		cfg.Upstreams = append(cfg.Upstreams, up)
	}
	cfg.Default = "a"
	for _, r := range rules {
		cfg.Rules = append(cfg.Rules, mustRule(t, r))
	}
	s.rig = newRig(t, cfg, func(r *Router) { r.SetSniff(sniff) })
	return s
}

// dial is the next one.
func (s *sniffRig) dial(t *testing.T) string {
	t.Helper()
	select {
	case d := <-s.dialed:
		return d
	case <-time.After(testkit.Patience):
		t.Fatal("nothing was dialled")
		return ""
	}
}

// opened waits for the SYN to be answered.
func opened(t *testing.T, q *fakeRequest) (s *fakeStream) {
	t.Helper()
	testkit.Eventually(t, "the handshake", func() bool { _, _, s = q.outcome(); return s != nil })
	return s
}

// reset waits for RST.
func (s *fakeStream) reset(t *testing.T) {
	t.Helper()
	testkit.Eventually(t, "RST", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.aborted && s.closed })
}

// Rules see the name that a flow says, which travels by its address; a flow that is refused then ends by RST.
func TestSniffRules(t *testing.T) {
	testkit.CheckLeaks(t)
	var decisions logBuffer
	g := newSniffRig(t, Config{Decisions: &decisions}, &Sniff{Ports: []uint16{80, 443}, Wait: time.Hour},
		"name .bad.example reject", "name .silent.example drop", "name .b.example via b", "name .here.example direct",
		"name a.example via a")
	for _, row := range []struct{ port, first, dial, line string }{
		{"443", clientHello(t, "www.b.example"), "b 203.0.113.1:443", `host=www.b.example rule="name .b.example via b"`},
		{"80", httpGet("B.example.:8080"), "b 203.0.113.1:80", `host=b.example rule="name .b.example via b"`},
		{"80", httpGet("here.example"), "direct 203.0.113.1:80", `host=here.example`},
		{"443", clientHello(t, "other.example"), "a 203.0.113.1:443", `host=other.example rule=default`},
		{"443", "\x13BitTorrent protocol", "a 203.0.113.1:443", `host="" rule=default`},
		{"443", clientHello(t, ""), "a 203.0.113.1:443", `host="" rule=default`},
		{"80", httpGet("192.0.2.1"), "a 203.0.113.1:80", `host="" rule=default`},
		{"80", httpGet("b!.b.example"), "a 203.0.113.1:80", `host="" rule=default`},
		{"443", clientHello(t, "x.bad.example"), "",
			`host=x.bad.example rule="name .bad.example reject" upstream="" state=rejected`},
		{"80", httpGet("silent.example"), "", `host=silent.example rule="name .silent.example drop" upstream="" state=dropped`},
	} {
		before := len(g.log.lines(row.line))
		q := newRequest(appEnd, "203.0.113.1:"+row.port)
		g.HandleStream(q)
		s := opened(t, q)
		if n := len(g.dialed); n != 0 {
			t.Fatalf("%s: dialled before the name was known", row.line)
		}
		s.send(row.first, false)
		if row.dial != "" {
			if d := g.dial(t); d != row.dial {
				t.Errorf("%s: dialled %q, want %q", row.line, d, row.dial)
			}
		}
		s.reset(t)
		testkit.Eventually(t, row.line, func() bool { return len(g.log.lines(row.line)) == before+1 })
	}
	if s := g.Stats(); s.Sniffs != 10 || s.Sniffed != 6 || s.StreamsNow != 0 || g.tcp.sniffs.bytes.Load() != 0 ||
		len(g.dialed) != 0 {
		t.Errorf("%+v, %d bytes held", s, g.tcp.sniffs.bytes.Load())
	}
	testkit.Eventually(t, "the decisions", func() bool { return len(decisions.lines("")) == 10 })
	var d decisionLine
	err := json.Unmarshal([]byte(decisions.lines("")[0]), &d)
	if err != nil || fmt.Sprint(d.Names) != "[www.b.example]" || d.Verdict != "via b" {
		t.Errorf("decision %+v, %v", d, err)
	}
}

// What is not asked for its name is dialled before its SYN is answered.
func TestSniffNeedless(t *testing.T) {
	testkit.CheckLeaks(t)
	const byName = "name x.example via b"
	for _, row := range []struct {
		what, dst string
		want      flow.Refusal
		sniff     *Sniff
		rules     []string
		learn     string
	}{
		{"off", "203.0.113.1:443", flow.RefuseHost, nil, []string{byName}, ""},
		{"another port", "203.0.113.1:22", flow.RefuseHost, &Sniff{}, []string{byName}, ""},
		{"no rule by name", "203.0.113.1:443", flow.RefuseHost, &Sniff{}, []string{"port 25 reject"}, ""},
		{"a rule of another port", "203.0.113.1:443", flow.RefuseHost, &Sniff{}, []string{"name x.example port 80 via b"}, ""},
		{"a rule before", "203.0.113.1:443", flow.RefuseReset, &Sniff{}, []string{"dst 203.0.113.0/24 reject", byName}, ""},
		{"a rule that decides the same", "203.0.113.1:443", flow.RefuseHost, &Sniff{}, []string{"name x.example via a"}, ""},
		{"a name from DNS", "203.0.113.1:443", flow.RefuseHost, &Sniff{}, []string{byName}, "y.example"},
		{"nothing to carry", "224.0.0.1:443", flow.RefuseNet, &Sniff{Names: true}, []string{byName}, ""},
		{"direct", "203.0.113.1:443", flow.RefuseHost, &Sniff{Names: true}, []string{"direct"}, ""},
	} {
		t.Run(row.what, func(t *testing.T) {
			if row.sniff != nil {
				row.sniff.Ports = []uint16{443}
			}
			g := newSniffRig(t, Config{}, row.sniff, row.rules...)
			if row.learn != "" {
				g.names.add(netip.MustParseAddr("203.0.113.1"), row.learn, g.now(), g.now()+int64(time.Hour))
			}
			q := newRequest(appEnd, row.dst)
			g.HandleStream(q)
			if why := refusal(t, q); why != row.want {
				t.Errorf("refused by %v, want %v", why, row.want)
			}
			if accepted, _, _ := q.outcome(); accepted {
				t.Error("accepted")
			}
		})
	}
}

// With Names the proxy is told the name, unless it would mean something else there.
func TestSniffNames(t *testing.T) {
	testkit.CheckLeaks(t)
	g := newSniffRig(t, Config{Pool: newPool(t)}, &Sniff{Ports: []uint16{443}, Names: true, Wait: time.Hour},
		"name .here.example direct")
	for name, dial := range map[string]string{
		"www.example.com": "a www.example.com", "WWW.Example.com": "a www.example.com",
		"x.here.example": "direct 203.0.113.1:443",
		"localhost":      "a 203.0.113.1:443", "x.localhost": "a 203.0.113.1:443", "printer.local": "a 203.0.113.1:443",
		"single": "a 203.0.113.1:443",
	} {
		q := newRequest(appEnd, "203.0.113.1:443")
		g.HandleStream(q)
		s := opened(t, q)
		s.send(httpGet(name), false)
		if d := g.dial(t); d != dial {
			t.Errorf("%s: dialled %q, want %q", name, d, dial)
		}
		s.reset(t)
	}
	g.SetSniff(nil)
	q := newRequest(appEnd, "203.0.113.1:443")
	g.HandleStream(q)
	if why := refusal(t, q); why != flow.RefuseHost {
		t.Errorf("switched off: %v", why)
	}
}

// All that the program sends arrives in order, whether it spoke first or its server did, with FIN behind it.
func TestSniffCarries(t *testing.T) {
	testkit.CheckLeaks(t)
	far := echo(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(netip.MustParseAddrPort("203.0.113.1:443"), far)
	g := newRig(t, Config{
		Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", Rules: []Rule{mustRule(t, "name x.example reject")},
	}, func(r *Router) { r.SetSniff(&Sniff{Ports: []uint16{443}, Wait: 30 * time.Millisecond}) })
	long := strings.Repeat("0123456789", 5000)
	for what, parts := range map[string][]string{
		"TLS":               {clientHello(t, "y.example"), "more"},
		"TLS in two":        {clientHello(t, "y.example")[:100], clientHello(t, "y.example")[100:]},
		"HTTP":              {httpGet("y.example"), long},
		"a long first turn": {httpGet("y.example") + long},
		"no end":            {"GET / HTTP/1.1\r\nX: " + long, long},
		"half a hello":      {clientHello(t, "y.example")[:100]},
		"silence":           nil,
	} {
		q := newRequest(appEnd, "203.0.113.1:443")
		g.HandleStream(q)
		s := opened(t, q)
		for _, p := range parts {
			s.send(p, false)
		}
		want := strings.Join(parts, "")
		if parts == nil {
			testkit.Eventually(t, "the dial of a silent flow", func() bool {
				f := g.Flows()
				return len(f) == 1 && f[0].State == "open"
			})
			s.send("late", false)
			want = "late"
		}
		testkit.Eventually(t, what+": the echo", func() bool { b, fin := s.received(); return b == want && !fin })
		s.send("", true)
		testkit.Eventually(t, what+": FIN", func() bool { b, fin := s.received(); return b == want && fin })
	}
	// A program that half-closes at once, and one that closes without a word.
	for _, first := range []string{httpGet("y.example"), "half", ""} {
		q := newRequest(appEnd, "203.0.113.1:443")
		g.HandleStream(q)
		s := opened(t, q)
		s.send(first, true)
		testkit.Eventually(t, "the echo and FIN", func() bool { b, fin := s.received(); return b == first && fin })
	}
	testkit.Eventually(t, "the end", func() bool { return g.Stats().StreamsNow == 0 })
	if n := g.tcp.sniffs.bytes.Load(); n != 0 {
		t.Errorf("%d bytes are held", n)
	}
}

// A program that goes away is not dialled for, or its dial is ended.
func TestSniffGone(t *testing.T) {
	testkit.CheckLeaks(t)
	ended := make(chan struct{}, 1)
	up := &fakeUpstream{name: "a", dial: func(ctx context.Context, _ Dest, done func(int, error)) {
		context.AfterFunc(ctx, func() { ended <- struct{}{}; done(-1, ctx.Err()) })
	}}
	g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "a", Rules: []Rule{mustRule(t, "name x.example reject")}},
		func(r *Router) { r.SetSniff(&Sniff{Ports: []uint16{443}, Wait: time.Hour}) })
	q := newRequest(appEnd, "203.0.113.1:443")
	q.gone = true
	g.HandleStream(q)
	testkit.Eventually(t, "its line", func() bool { return len(g.log.lines("state=cancelled")) == 1 })

	rst := func(s *fakeStream) { s.Abort(); s.l.Ready(flow.Hup) }
	q = newRequest(appEnd, "203.0.113.1:443")
	g.HandleStream(q)
	rst(opened(t, q))
	testkit.Eventually(t, "the line of a RST before any byte", func() bool { return len(g.log.lines("state=cancelled")) == 2 })

	q = newRequest(appEnd, "203.0.113.1:443")
	g.HandleStream(q)
	s := opened(t, q)
	s.send(httpGet("y.example"), false)
	testkit.Eventually(t, "the dial", func() bool {
		f := g.Flows()
		return len(f) == 1 && f[0].Host == "y.example" && f[0].State == "dialing"
	})
	rst(s)
	<-ended
	testkit.Eventually(t, "the line of a RST while it is dialled", func() bool {
		return len(g.log.lines("state=cancelled")) == 3
	})

	// The end of the Router ends what waits, and what is dialled.
	waits, dials := newRequest(appEnd, "203.0.113.1:443"), newRequest(appEnd, "203.0.113.1:443")
	g.HandleStream(waits)
	g.HandleStream(dials)
	opened(t, dials).send(httpGet("y.example"), false)
	testkit.Eventually(t, "the dial", func() bool { return len(g.Flows()) == 1 })
	g.Close()
	opened(t, waits).reset(t)
	opened(t, dials).reset(t)
	if n := len(g.log.lines("state=aborted")); n != 2 {
		t.Errorf("%d lines of flows that were aborted: %q", n, g.log.lines("msg=flow"))
	}
	late := newRequest(appEnd, "203.0.113.1:443")
	g.HandleStream(late)
	if why := refusal(t, late); why != flow.RefuseReset {
		t.Errorf("after the end: %v", why)
	}
}

// The name and the owner of a flow are both found, in either order.
func TestSniffAndOwner(t *testing.T) {
	testkit.CheckLeaks(t)
	owners := &fakeOwners{}
	owners.set("10.0.0.1:1", flow.Owner{Known: true, UID: 1000})
	owners.set("10.0.0.1:2", flow.Owner{Known: true, UID: 1001})
	for _, rules := range [][]string{
		{"name x.example user 1000 via b"}, // the owner matters when the name is known
		{"user 1000 name x.example via b", "user 5 reject"},
	} {
		g := newSniffRig(t, Config{Owners: owners}, &Sniff{Ports: []uint16{443}, Wait: time.Hour}, rules...)
		for src, dial := range map[string]string{"10.0.0.1:1": "b 203.0.113.1:443", "10.0.0.1:2": "a 203.0.113.1:443"} {
			q := newRequest(src, "203.0.113.1:443")
			g.HandleStream(q)
			if src == "10.0.0.1:2" && len(rules) == 2 { // its owner is known, and no name changes anything for this owner
				if why := refusal(t, q); why != flow.RefuseHost {
					t.Errorf("%q: %v", rules, why)
				}
				g.dial(t)
				continue
			}
			s := opened(t, q)
			s.send(httpGet("x.example"), false)
			if d := g.dial(t); d != dial {
				t.Errorf("%q: dialled %q, want %q", rules, d, dial)
			}
			s.reset(t)
		}
	}
}

// There is a bound on the flows that are asked, and on the bytes that are held of them.
func TestSniffLimit(t *testing.T) {
	testkit.CheckLeaks(t)
	g := newSniffRig(t, Config{}, &Sniff{Ports: []uint16{443}, Wait: time.Hour}, "name x.example via b")
	for range maxSniffs {
		g.HandleStream(newRequest(appEnd, "203.0.113.1:443"))
	}
	over := newRequest(appEnd, "203.0.113.1:443")
	g.HandleStream(over)
	if why := refusal(t, over); why != flow.RefuseLater || g.Stats().SniffsFull != 1 {
		t.Errorf("over the limit: %v, %+v", why, g.Stats())
	}
	g.Close()
	if n := len(g.tcp.sniffs.now); n != 0 {
		t.Errorf("%d flows are left", n)
	}
	g = newSniffRig(t, Config{}, &Sniff{Ports: []uint16{443}, Wait: time.Hour}, "name x.example via b")
	g.tcp.sniffs.bytes.Store(maxSniffed)
	g.HandleStream(over)
	testkit.Eventually(t, "a refusal", func() bool {
		_, why, _ := over.outcome()
		return len(why) == 2 && why[1] == flow.RefuseLater
	})
}

// nameMatters agrees with what names do: where it says no, no name changes what is done.
func TestNameMatters(t *testing.T) {
	texts := []string{
		"name x.example via b", "not name x.example via b", "name x.example reject", "name .example port 443 via a",
		"dst 203.0.113.1 via b", "dst 203.0.113.9 name x.example drop", "not name y.example port 443 reject", "port 443 direct",
		"proto udp reject", "not dst 203.0.113.1 not name x.example via b",
	}
	var ups []Upstream
	for _, name := range []string{"a", "b", DirectName} {
		ups = append(ups, &fakeUpstream{name: name})
	}
	matters, all := 0, 0
	for i := range texts {
		for j := range texts {
			for k := range texts {
				rules := []Rule{mustRule(t, texts[i]), mustRule(t, texts[j]), mustRule(t, texts[k])}
				p, err := newPolicy(Config{Upstreams: ups, Default: "a", Rules: rules}, nil)
				if err != nil {
					t.Fatal(err)
				}
				q := query{proto: flow.TCP, dst: netip.MustParseAddrPort("203.0.113.1:443")}
				v := p.decide(&q)
				all++
				if p.nameMatters(&q, v) {
					matters++
					continue
				}
				for _, name := range []string{"x.example", "y.example", "z.example", "z.test"} {
					q.names = []string{name}
					if w := p.decide(&q); w.kind != v.kind || w.up != v.up {
						t.Errorf("%q, %q, %q: %s turns %q into %q", texts[i], texts[j], texts[k], name, v.rule, w.rule)
					}
				}
			}
		}
	}
	if matters == 0 || matters == all {
		t.Errorf("a name matters in %d of %d cases", matters, all)
	}
}

// A flow that is not asked for its name costs nothing more.
func BenchmarkSniffNot(b *testing.B) {
	for _, on := range []bool{false, true} {
		b.Run(fmt.Sprint(on), func(b *testing.B) {
			up := &fakeUpstream{name: "a"}
			up.dial = func(_ context.Context, _ Dest, done func(int, error)) { done(-1, socks.ReplyRefused) }
			g := newRig(b, Config{Upstreams: []Upstream{up}, Default: "a"}, func(r *Router) {
				if on {
					r.SetSniff(&Sniff{Ports: []uint16{80, 443}})
				}
			})
			q := newRequest(appEnd, "203.0.113.1:443")
			b.ReportAllocs()
			for b.Loop() {
				q.rejected = q.rejected[:0]
				g.HandleStream(q)
			}
		})
	}
}
