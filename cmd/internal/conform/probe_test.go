package conform

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// Addresses of documentation for what the tests' servers answer by a fault.
var (
	unreachable = netip.MustParseAddrPort("192.0.2.1:7000")
	silence     = netip.MustParseAddrPort("192.0.2.2:7000")
	nowhere     = netip.MustParseAddrPort("192.0.2.3:7000")
)

func server(t *testing.T, at string) socks.Server {
	t.Helper()
	s, err := socks.ParseServer("socks5://" + at)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// startFar gives a far end on two addresses of loopback, and the targets around it.
func startFar(t *testing.T) Ends {
	t.Helper()
	f, err := ListenFar(0, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := ln.Addr().(*net.TCPAddr).AddrPort()
	ln.Close()
	return Ends{TCP: f.TCP(), UDP: f.UDP(), Name: "far.example", Refused: refused, Unreachable: unreachable, Silent: silence,
		Unsendable: map[string]netip.AddrPort{"no route": nowhere}}
}

// startSockstest gives a server that reaches the far end, and has the fault for what it is asked for.
func startSockstest(t *testing.T, e Ends, fault func(sockstest.Request) sockstest.Fault, opts ...sockstest.Option,
) *sockstest.Server {
	t.Helper()
	resolve := func(name string) (netip.Addr, error) {
		if name != e.Name {
			return netip.Addr{}, errors.New("no such name")
		}
		return e.TCP.Addr(), nil
	}
	s, err := sockstest.Listen("tcp", "127.0.0.1:0",
		append(opts, sockstest.WithRedirectsOnly(), sockstest.WithResolve(resolve))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for _, at := range []netip.AddrPort{e.TCP, e.Refused, e.UDP[0][0], e.UDP[0][1], e.UDP[1][0], e.UDP[1][1]} {
		s.Redirect(at, at)
	}
	s.SetFault(func(r sockstest.Request) sockstest.Fault {
		if fault != nil {
			if f := fault(r); f.Reply != 0 || f.Raw != nil || f.NoAnswer || f.Bound != nil {
				return f
			}
		}
		switch netip.AddrPortFrom(r.Dst.IP, r.Dst.Port) {
		case unreachable:
			return sockstest.Reply(4)
		case silence:
			return sockstest.Silence()
		}
		return sockstest.Fault{}
	})
	return s
}

func config(s socks.Server, e Ends) Config {
	return Config{Server: s, Ends: e, Wait: 3 * time.Second, SilentWait: 500 * time.Millisecond,
		UDPWait: 150 * time.Millisecond}
}

// TestWellBehaved: a server that does everything right gets a report that says so.
func TestWellBehaved(t *testing.T) {
	e := startFar(t)
	s := startSockstest(t, e, nil)
	fds := sockets(t)
	r, err := Probe(t.Context(), config(server(t, s.Addr().String()), e))
	if err != nil {
		t.Fatal(err)
	}
	// The server and the far end, which are here too, close theirs a little later.
	if n := 0; !testkit.Until(testkit.Patience, func() bool { n = sockets(t); return n <= fds }) {
		t.Fatalf("%d sockets before the probe, %d after it", fds, n)
	}
	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", text.String())
	check(t, "reachable", r.Reachable, true)
	check(t, "method", [2]int{r.MethodOfNone, r.MethodOfBoth}, [2]int{0, 0})
	check(t, "open", r.Open.Kind == Granted && r.Open.Works && r.Open.First && !r.Open.Early, true)
	check(t, "refused", r.Refused.String(), "5")
	check(t, "unreachable", r.Unreachable.String(), "4")
	check(t, "silent", r.Silent.Kind, Silence)
	check(t, "IPv6", r.IPv6.Kind, NotAsked)
	check(t, "name", r.Name.Works, true)
	check(t, "FIN", [2]Passage{r.HalfCloseUp, r.HalfCloseDown}, [2]Passage{Passed, Passed})
	check(t, "RST", [2]Passage{r.ResetUp, r.ResetDown}, [2]Passage{Passed, Passed})
	check(t, "truthful", r.Truthful(), true)
	u := r.UDP
	check(t, "UDP", u.Works && u.TrueSource && !u.Repaired && u.EndsWithTCP, true)
	check(t, "mapping", u.Mapping, EndpointIndependent)
	check(t, "filtering", u.Filtering, EndpointIndependent)
	check(t, "up", [2]int{u.LargestUp, u.CutUp}, [2]int{65497, 0})
	check(t, "down", [2]int{u.LargestDown, u.CutDown}, [2]int{65497, 0})
	for _, why := range []string{"port 0", "unknown name", "closed port", "no route"} {
		check(t, why, u.After[why], Survives)
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(b, &back); err != nil || back.UDP.LargestUp != 65497 || back.Silent.Kind != Silence {
		t.Errorf("from JSON: %+v, %v", back, err)
	}
}

// sockets counts those of this process. Other descriptors come and go: io.Copy keeps pipes for splice.
func sockets(t *testing.T) (n int) {
	t.Helper()
	for _, to := range testkit.Files(t) {
		if strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

func check[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// TestAnswers: each way of answering a request is named.
func TestAnswers(t *testing.T) {
	e := startFar(t)
	tests := map[string]struct {
		fault sockstest.Fault
		want  Answer // Kind, Code and Short
		error string // a part of it
	}{
		"reply 1":        {sockstest.Reply(1), Answer{Kind: Refused, Code: 1}, ""},
		"unassigned":     {sockstest.Reply(77), Answer{Kind: Refused, Code: 77}, ""},
		"FIN":            {sockstest.EarlyClose(), Answer{Kind: Closed}, ""},
		"RST":            {sockstest.EarlyReset(), Answer{Kind: Reset}, ""},
		"two bytes":      {sockstest.Fault{Raw: []byte{5, 5}}, Answer{Kind: Refused, Code: 5, Short: true}, ""},
		"silence":        {sockstest.Silence(), Answer{Kind: Silence}, ""},
		"garbage":        {sockstest.Garbage(), Answer{Kind: Malformed}, "version 72"},
		"no such ATYP":   {sockstest.BadAddrType(), Answer{Kind: Malformed}, "address type 2"},
		"half an answer": {sockstest.Fault{Raw: []byte{5, 0, 0}}, Answer{Kind: Malformed}, "FIN after 05 00 00"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startSockstest(t, e, func(sockstest.Request) sockstest.Fault { return tt.fault })
			p := newProber(config(server(t, s.Addr().String()), e))
			a := p.try(t.Context(), socks.AddrFrom(e.TCP), 700*time.Millisecond)
			if a.Kind != tt.want.Kind || a.Code != tt.want.Code || a.Short != tt.want.Short ||
				!strings.Contains(a.Error, tt.error) {
				t.Errorf("%+v, want %+v", a, tt.want)
			}
			if name == "silence" && a.After < 600 {
				t.Errorf("silence after %d ms", a.After)
			}
		})
	}
}

// TestGreetings: what a server does before the request is told apart from its answer.
func TestGreetings(t *testing.T) {
	e := startFar(t)
	for name, tt := range map[string]struct {
		fault        sockstest.Fault
		method       int
		kind         Kind
		beforeAsking bool
	}{
		"wants a login all the same": {sockstest.Fault{Raw: []byte{5, 2}}, 2, Malformed, true},
		"accepts nothing":            {sockstest.Fault{Raw: []byte{5, 0xff}}, 255, NoLogin, false},
		"no SOCKS":                   {sockstest.Garbage(), -1, Malformed, true},
		"FIN":                        {sockstest.EarlyClose(), -1, Closed, true},
		"silence":                    {sockstest.Silence(), -1, Silence, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startSockstest(t, e, nil)
			s.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return tt.fault })
			c := config(server(t, s.Addr().String()), e)
			c.Wait = 500 * time.Millisecond
			p := newProber(c)
			p.methods(t.Context())
			check(t, "method", p.report.MethodOfNone, tt.method)
			a := p.try(t.Context(), socks.AddrFrom(e.TCP), c.Wait)
			if a.Kind != tt.kind && !(tt.method == 2 && a.Kind == NoLogin) {
				t.Errorf("%+v", a)
			}
			if tt.beforeAsking && a.Kind != NoLogin && !strings.Contains(a.Error, "before the request") {
				t.Errorf("%q does not say that nothing was asked", a.Error)
			}
		})
	}
}

func TestLogin(t *testing.T) {
	e := startFar(t)
	s := startSockstest(t, e, nil, sockstest.WithAuth("alice", "secret"))
	plain := server(t, s.Addr().String())
	for pass, want := range map[string]Kind{"secret": Granted, "wrong": NoLogin} {
		with, err := plain.WithCredentials("alice", pass)
		if err != nil {
			t.Fatal(err)
		}
		p := newProber(config(with, e))
		p.methods(t.Context())
		check(t, "methods", [2]int{p.report.MethodOfNone, p.report.MethodOfBoth}, [2]int{255, 2})
		check(t, pass, p.try(t.Context(), socks.AddrFrom(e.TCP), p.Wait).Kind, want)
		b, _ := json.Marshal(p.report)
		if bytes.Contains(b, []byte(pass)) || bytes.Contains(b, []byte("alice")) {
			t.Errorf("the report has the credentials: %s", b)
		}
	}
}

// TestRelayFaults: what a relay does wrong with FIN, RST and the time of its grant.
func TestRelayFaults(t *testing.T) {
	e := startFar(t)
	p := newProber(config(startRogue(t, &rogue{early: true}), e))
	p.targets(t.Context())
	check(t, "open", p.report.Open.Works && !p.report.Open.Early, true)
	check(t, "refused", p.report.Refused.String(), "granted early")
	check(t, "truthful", p.report.Truthful(), false)
	p.halfClose(t.Context())
	p.resets(t.Context())
	check(t, "FIN up", p.report.HalfCloseUp, CutOff)
	check(t, "FIN down", p.report.HalfCloseDown, CutOff)
	check(t, "RST up", p.report.ResetUp, BecameFIN)
	check(t, "RST down", p.report.ResetDown, BecameFIN)

	c := config(startRogue(t, &rogue{keepsFIN: true}), e)
	c.Wait = time.Second
	p = newProber(c)
	p.targets(t.Context())
	check(t, "refused", p.report.Refused.String(), "5")
	p.halfClose(t.Context())
	check(t, "FIN up", p.report.HalfCloseUp, Lost)
	check(t, "FIN down", p.report.HalfCloseDown, Lost)
}

func TestBindAndSOCKS4(t *testing.T) {
	e := startFar(t)
	for name, tt := range map[string]struct {
		r      *rogue
		second Kind
		peer   bool
		works  bool
	}{
		"good":    {&rogue{}, Granted, true, true},
		"no peer": {&rogue{noPeer: true}, Granted, false, true},
		"deaf":    {&rogue{deafBind: true}, Failed, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProber(config(startRogue(t, tt.r), e))
			p.targets(t.Context())
			p.bind(t.Context())
			b := p.report.Bind
			check(t, "first", b.First.Kind, Granted)
			check(t, "second", b.Second.Kind, tt.second)
			check(t, "peer", b.Peer, tt.peer)
			check(t, "works", b.Second.Works, tt.works)
			p.socks4(t.Context())
			check(t, "SOCKS4", p.report.SOCKS4.Works, true)
			check(t, "SOCKS4a", p.report.SOCKS4a.Works, true)
		})
	}
	e.TCP = e.Refused
	p := newProber(config(startRogue(t, &rogue{}), e))
	p.socks4(t.Context())
	check(t, "SOCKS4", p.report.SOCKS4.Code, 91)
}

// The second reply of BIND may be a refusal of two bytes, too.
func TestSecondReply(t *testing.T) {
	e := startFar(t)
	second := func(reply string) Answer {
		p := newProber(config(startRogue(t, &rogue{second: reply}), e))
		p.targets(t.Context())
		p.bind(t.Context())
		return p.report.Bind.Second
	}
	if a := second("\x05\x05"); a.Kind != Refused || a.Code != 5 || !a.Short {
		t.Errorf("%+v", a)
	}
	if a := second("\x05\x00\x00\x02\x01\x02\x03\x04\x00\x50"); a.Kind != Malformed {
		t.Errorf("%+v", a)
	}
}

// What is no SOCKS4 is malformed, whatever its bytes would say in SOCKS5; a refusal keeps the code of SOCKS4.
func TestSOCKS4Answers(t *testing.T) {
	for reply, want := range map[string]Answer{
		"\x05\xff":         {Kind: Malformed},
		"\x00\x5a\x00":     {Kind: Malformed},
		"\x00\x5d\x00\x00": {Kind: Refused, Code: 93},
		"":                 {Kind: Closed},
	} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer ln.Close()
			if c, err := ln.Accept(); err == nil {
				defer c.Close()
				c.Read(make([]byte, 64)) // the request, so that the end is a FIN
				io.WriteString(c, reply)
			}
		}()
		e := Ends{TCP: netip.MustParseAddrPort("192.0.2.9:80")}
		p := newProber(config(server(t, ln.Addr().String()), e))
		p.socks4(t.Context())
		if a := p.report.SOCKS4; a.Kind != want.Kind || a.Code != want.Code || a.Short {
			t.Errorf("% x: %+v, want %+v", reply, a, want)
		}
	}
}
