package route

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

const (
	appEnd  = "10.0.0.1:4000"
	farEnd  = "203.0.113.1:80"
	farEnd6 = "[2001:db8::1]:80"
)

// echo is a far end that sends back what it gets and then FIN.
func echo(t testing.TB) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			// The wrapper keeps io.Copy from splice, whose pipes stay in a pool and look like a leak.
			wg.Go(func() { defer c.Close(); _, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func refusal(t *testing.T, q *fakeRequest) flow.Refusal {
	t.Helper()
	var why []flow.Refusal
	testkit.Eventually(t, "a refusal", func() bool { _, why, _ = q.outcome(); return len(why) > 0 })
	if len(why) > 1 {
		t.Errorf("rejected %d times: %v", len(why), why)
	}
	return why[0]
}

func TestStreamCarried(t *testing.T) {
	testkit.CheckLeaks(t)
	far := echo(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(netip.MustParseAddrPort(farEnd), far)
	srv.Redirect(netip.MustParseAddrPort(farEnd6), far)
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	for _, dst := range []string{farEnd, farEnd6, farEnd} {
		q := newRequest(appEnd, dst)
		g.HandleStream(q)
		var s *fakeStream
		testkit.Eventually(t, "the grant", func() bool { _, _, s = q.outcome(); return s != nil })
		s.send("hello", true)
		testkit.Eventually(t, "the echo and FIN", func() bool { b, fin := s.received(); return b == "hello" && fin })
	}
	testkit.Eventually(t, "the end", func() bool { return g.Stats().StreamsNow == 0 })
	format := regexp.MustCompile(
		`level=INFO msg=flow flow=\d+ proto=tcp src=10\.0\.0\.1:4000 dst=\S+ host="" rule=default upstream=p state=closed up=5 down=5 dur=\S+ err=""\n`,
	)
	testkit.Eventually(t, "a line for each flow", func() bool { return len(g.log.lines("msg=flow")) == 3 })
	for _, line := range g.log.lines("msg=flow") {
		if !format.MatchString(line) {
			t.Errorf("log line %q", line)
		}
	}
	if s := g.Stats(); s.Up != 15 || s.Down != 15 || s.Streams != 3 {
		t.Errorf("%+v", s)
	}
}

func TestStreamReplies(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	_, hasty := newClient(t, srv.URL(), socks.Options{HandshakeTimeout: 300 * time.Millisecond})
	g := newRig(t, Config{
		Upstreams: []Upstream{NewSOCKS("p", client), NewSOCKS("hasty", hasty)}, Default: "p",
		Rules: []Rule{mustRule(t, "port 81 via hasty")},
	}, nil)
	for _, tt := range []struct {
		name  string
		fault sockstest.Fault
		want  flow.Refusal
		state string
	}{
		{"1", sockstest.Reply(1), flow.RefuseReset, "refused"},
		{"2", sockstest.Reply(2), flow.RefuseAdmin, "refused"},
		{"3", sockstest.Reply(3), flow.RefuseNet, "refused"},
		{"4", sockstest.Reply(4), flow.RefuseHost, "refused"},
		{"5", sockstest.Reply(5), flow.RefuseReset, "refused"},
		{"6", sockstest.Reply(6), flow.RefuseHost, "refused"},
		{"7", sockstest.Reply(7), flow.RefuseNet, "refused"},
		{"8", sockstest.Reply(8), flow.RefuseNet, "refused"},
		{"silence", sockstest.Silence(), flow.RefuseSilent, "silent"},
		{"garbage", sockstest.Garbage(), flow.RefuseNet, "refused"},
		{"early close", sockstest.EarlyClose(), flow.RefuseReset, "refused"},
	} {
		srv.SetFault(func(sockstest.Request) sockstest.Fault { return tt.fault })
		q := newRequest(appEnd, farEnd)
		state := "state=" + tt.state
		before := len(g.log.lines(state))
		if tt.want == flow.RefuseSilent {
			// The short time may be over before the request is on its way, which is the server's fault then.
			for range 20 {
				q = newRequest(appEnd, "203.0.113.1:81")
				g.HandleStream(q)
				if refusal(t, q) != flow.RefuseNet {
					break
				}
			}
		} else {
			g.HandleStream(q)
		}
		if got := refusal(t, q); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
		testkit.Eventually(t, tt.name+": its line", func() bool { return len(g.log.lines(state)) == before+1 })
		testkit.Eventually(t, "all lines", func() bool {
			return g.Stats().StreamsNow == 0 && len(g.log.lines("msg=flow")) == int(g.Stats().Streams)
		})
	}
}

func TestStreamVerdicts(t *testing.T) {
	testkit.CheckLeaks(t)
	dials := make(chan Dest, 10)
	up := &fakeUpstream{name: "p", dial: func(_ context.Context, d Dest, done func(int, error)) {
		dials <- d
		done(-1, socks.ReplyRefused)
	}}
	g := newRig(t, Config{
		Upstreams: []Upstream{up},
		Rules: []Rule{
			mustRule(t, "port 25 reject"),
			mustRule(t, "port 26 drop"),
			mustRule(t, "dst 203.0.113.0/24 via p"),
			mustRule(t, "dst 192.0.2.53 via p"),
		},
		Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.53:5353"))},
	}, nil)
	for _, tt := range []struct {
		dst  string
		want flow.Refusal
		dial string
		line string
	}{
		{"203.0.113.1:25", flow.RefuseReset, "", `rule="port 25 reject" upstream="" state=rejected`},
		{"203.0.113.1:26", flow.RefuseSilent, "", `rule="port 26 drop" upstream="" state=dropped`},
		{"203.0.113.1:80", flow.RefuseReset, "203.0.113.1:80", `rule="dst 203.0.113.0/24 via p" upstream=p state=refused`},
		{"198.51.100.1:80", flow.RefuseReset, "",
			`rule=none upstream="" state=rejected up=0 down=0 dur=0s err="no rule matches and there is no default"`},
		{"224.0.0.1:80", flow.RefuseNet, "", `state=refused`},
		{"10.9.9.9:53", flow.RefuseReset, "192.0.2.53:5353", `dst=10.9.9.9:53 host="" rule="dst 192.0.2.53/32 via p"`},
	} {
		q := newRequest(appEnd, tt.dst)
		g.HandleStream(q)
		if got := refusal(t, q); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.dst, got, tt.want)
		}
		dial := ""
		select {
		case d := <-dials:
			dial = d.String()
		default:
		}
		if dial != tt.dial {
			t.Errorf("%s: dialled %q, want %q", tt.dst, dial, tt.dial)
		}
		testkit.Eventually(t, tt.line, func() bool { return len(g.log.lines(tt.line)) > 0 })
	}
}

func TestStreamCancelled(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	q := newRequest(appEnd, farEnd)
	g.HandleStream(q)
	testkit.Eventually(t, "the request", func() bool { return srv.Stats().Requests == 1 })
	if f := g.Flows(); len(f) != 1 || f[0].State != "dialing" || f[0].Upstream != "p" || f[0].ID == 0 {
		t.Errorf("flows: %+v", f)
	}
	q.giveUp()
	testkit.Eventually(t, "the proxy to be left", func() bool { return srv.Stats().Open == 0 })
	testkit.Eventually(t, "the line", func() bool { return len(g.log.lines("state=cancelled")) == 1 })
	gone := newRequest(appEnd, farEnd) // gave up before we looked
	gone.gone = true
	g.HandleStream(gone)
	testkit.Eventually(t, "the second line", func() bool { return len(g.log.lines("state=cancelled")) == 2 })
	testkit.Eventually(t, "no flow to be left", func() bool { return g.Stats().StreamsNow == 0 })
}

// A grant that comes for an app that has gone is given back.
func TestStreamGrantedTooLate(t *testing.T) {
	testkit.CheckLeaks(t)
	var done func(int, error)
	up := &fakeUpstream{name: "p", dial: func(_ context.Context, _ Dest, d func(int, error)) { done = d }}
	g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "p"}, nil)
	q := newRequest(appEnd, farEnd)
	g.HandleStream(q)
	q.giveUp()
	p, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(p[1])
	done(p[0], nil)
	if n, err := syscall.Read(p[1], make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("the socket is still open: %d %v", n, err)
	}
	if accepted, _, _ := q.outcome(); accepted {
		t.Error("accepted for an app that has gone")
	}
}

// Neither a pending dial nor an idle flow holds a goroutine.
func TestStreamGoroutines(t *testing.T) {
	testkit.CheckLeaks(t)
	const many = 300
	far := echo(t)
	var pending []func(int, error)
	up := &fakeUpstream{
		name: "p",
		dial: func(_ context.Context, d Dest, done func(int, error)) { pending = append(pending, done) },
	}
	g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "p"}, nil)
	testkit.Settle(20*time.Millisecond, "all goroutines of the rig have begun")
	before := runtime.NumGoroutine()
	var reqs []*fakeRequest
	for range many {
		q := newRequest(appEnd, farEnd)
		reqs = append(reqs, q)
		g.HandleStream(q)
	}
	testkit.Eventually(t, "no goroutine for a pending dial", func() bool { return runtime.NumGoroutine() <= before+2 })
	for _, done := range pending {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: int(far.Port()), Addr: far.Addr().As4()}); err != nil {
			t.Fatal(err)
		}
		_ = syscall.SetNonblock(fd, true)
		done(fd, nil)
	}
	for _, q := range reqs {
		testkit.Eventually(t, "the grant", func() bool { _, _, s := q.outcome(); return s != nil })
	}
	// The echo server has one goroutine for each connection.
	testkit.Eventually(t, "no goroutine for an idle flow", func() bool { return runtime.NumGoroutine() <= before+many+2 })
	if f := g.Flows(); len(f) != many || f[0].State != "open" ||
		!slices.IsSortedFunc(f, func(a, b FlowInfo) int { return int(a.ID) - int(b.ID) }) {
		t.Errorf("%d flows, the first %+v", len(f), f[0])
	}
	g.Close()
	if n := len(g.log.lines("state=aborted")); n != many {
		t.Errorf("%d of %d flows have the line of their end", n, many)
	}
}

func TestStreamLimit(t *testing.T) {
	testkit.CheckLeaks(t)
	up := &fakeUpstream{name: "p", dial: func(ctx context.Context, _ Dest, done func(int, error)) {
		context.AfterFunc(ctx, func() { done(-1, ctx.Err()) })
	}}
	g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "p", Limits: Limits{Flows: 3}}, nil)
	var reqs []*fakeRequest
	for range 4 {
		reqs = append(reqs, newRequest(appEnd, farEnd))
		g.HandleStream(reqs[len(reqs)-1])
	}
	if got := refusal(t, reqs[3]); got != flow.RefuseLater || g.Stats().StreamsFull != 1 {
		t.Errorf("over the limit: %v, %+v", got, g.Stats())
	}
	g.Close()
	for _, q := range reqs[:3] {
		if got := refusal(t, q); got != flow.RefuseReset {
			t.Errorf("pending at the end: %v", got)
		}
	}
	late := newRequest(appEnd, farEnd)
	g.HandleStream(late)
	if got := refusal(t, late); got != flow.RefuseReset {
		t.Errorf("after the end: %v", got)
	}
}

// A proxy that is down is logged once and not for each flow, and once when it is back.
func TestStreamProxyDown(t *testing.T) {
	testkit.CheckLeaks(t)
	err := error(&socks.ServerError{Server: "socks5://192.0.2.1:1080", Op: socks.OpConnect, Err: syscall.ECONNREFUSED})
	up := &fakeUpstream{name: "p", dial: func(_ context.Context, _ Dest, done func(int, error)) { done(-1, err) }}
	g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "p"}, nil)
	for range 20 {
		q := newRequest(appEnd, farEnd)
		g.HandleStream(q)
		if got := refusal(t, q); got != flow.RefuseNet {
			t.Fatal(got)
		}
	}
	if u := g.Upstreams(); len(u) != 1 || !u[0].TCPDown || u[0].UDPDown {
		t.Errorf("%+v", u)
	}
	err = socks.ReplyRefused
	for range 20 {
		g.HandleStream(newRequest(appEnd, farEnd))
	}
	testkit.Eventually(t, "the flows' lines", func() bool { return len(g.log.lines("msg=flow")) == 40 })
	if down, up := g.log.lines("does not work for TCP"), g.log.lines("works again for TCP"); len(down) != 1 || len(up) != 1 ||
		!strings.Contains(down[0], "connection refused") {
		t.Errorf("down: %q, up: %q", down, up)
	}
}

func TestNewErrors(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("no loop: no error")
	}
	g := newRig(t, Config{Upstreams: []Upstream{&fakeUpstream{name: "p"}}, Default: "p"}, nil)
	cfg := g.cfg
	cfg.Limits.Flows = -1
	if _, err := New(cfg); err == nil {
		t.Error("a negative limit: no error")
	}
	cfg = g.cfg
	cfg.Resolvers = []dns.Resolver{{}}
	if _, err := New(cfg); err == nil {
		t.Error("a bad resolver: no error")
	}
	if err := g.Run(context.Background()); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("a second Run: %v", err)
	}
	r, err := New(g.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil { // never ran
		t.Error(err)
	}
}
