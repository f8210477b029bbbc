package route

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// echoAnswers are the answers that the app got, as words.
type echoAnswers struct {
	mu  sync.Mutex
	got []string
}

func (a *echoAnswers) add(s string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.got = append(a.got, s)
}

func (a *echoAnswers) ReplyEcho(p []byte) { a.add("reply " + string(p)) }

func (a *echoAnswers) RefuseEcho(p []byte, why flow.Refusal) { a.add(fmt.Sprintf("%v %s", why, p)) }

func (a *echoAnswers) all() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.got)
}

// echoRig has an upstream whose dials end as answer says, by port.
type echoRig struct {
	*rig
	echoAnswers
	mu     sync.Mutex
	dialed []string
}

// newEchoRig makes a router with --ping 443,80. answer returns what a dial ends with, and false if it never ends by itself.
func newEchoRig(t *testing.T, cfg Config, answer func(Dest) (error, bool), rules ...string) *echoRig {
	t.Helper()
	testkit.CheckLeaks(t)
	e := &echoRig{}
	for _, name := range []string{"a", "b"} {
		up := &fakeUpstream{name: name}
		up.dial = func(ctx context.Context, d Dest, done func(int, error)) {
			e.mu.Lock()
			e.dialed = append(e.dialed, fmt.Sprintf("%s %s:%d", name, d, d.Addr.Port()))
			e.mu.Unlock()
			go func() {
				err, ends := answer(d)
				switch {
				case !ends:
					<-ctx.Done()
					done(-1, ctx.Err())
				case err != nil:
					done(-1, err)
				default:
					done(openSocket(t), nil)
				}
			}()
		}
		cfg.Upstreams = append(cfg.Upstreams, up)
	}
	cfg.Default = "a"
	for _, r := range rules {
		cfg.Rules = append(cfg.Rules, mustRule(t, r))
	}
	e.rig = newRig(t, cfg, func(r *Router) { r.SetPing([]uint16{443, 80}); r.echo.wait = 50 * time.Millisecond })
	return e
}

// openSocket is one end of a pair whose other end is closed.
func openSocket(t *testing.T) int {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return -1
	}
	syscall.Close(fds[1])
	return fds[0]
}

var (
	echoSrc = netip.MustParseAddr("10.0.0.2")
	echoDst = netip.MustParseAddr("203.0.113.9")
)

func (e *echoRig) ping(dst netip.Addr, what string) bool {
	packet := []byte(what)
	took := e.HandleEcho(0, flow.Echo{Src: echoSrc, Dst: dst, Packet: packet, By: &e.echoAnswers})
	clear(packet) // it was only lent
	return took
}

func (e *echoRig) dials() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.dialed)
}

// TestEchoOutcomes: what a dial shows, and how the ports follow each other.
func TestEchoOutcomes(t *testing.T) {
	server := &socks.ServerError{Server: "socks5://192.0.2.1", Op: socks.OpConnect, Err: syscall.ECONNREFUSED}
	netDown, hostDown := socks.ReplyNetUnreachable, socks.ReplyHostUnreachable
	both := []string{"a 203.0.113.9:443:443", "a 203.0.113.9:80:80"}
	for name, tt := range map[string]struct {
		at443, at80 error
		rules       string
		want        string // empty: no answer
		dials       []string
	}{
		"granted":                 {want: "reply", dials: both[:1]},
		"refused":                 {at443: socks.ReplyRefused, want: "reply", dials: both[:1]},
		"refused, direct":         {at443: syscall.ECONNREFUSED, want: "reply", dials: both[:1]},
		"unreachable, then there": {at443: hostDown, want: "reply", dials: both},
		"network":                 {at443: netDown, at80: netDown, want: "net-unreachable", dials: both},
		"host":                    {at443: hostDown, at80: hostDown, want: "host-unreachable", dials: both},
		"host, direct":            {at443: syscall.EHOSTUNREACH, at80: syscall.EHOSTUNREACH, want: "host-unreachable", dials: both},
		"not allowed":             {at443: socks.ReplyNotAllowed, at80: hostDown, want: "admin-prohibited", dials: both},
		"general failure":         {at443: socks.ReplyGeneralFailure, at80: socks.ReplyGeneralFailure, dials: both},
		"late":                    {at443: socks.ErrLate, at80: socks.ErrLate, dials: both},
		"no server":               {at443: server, at80: server, dials: both},
		"rejected":                {rules: "reject", want: "admin-prohibited"},
		"dropped":                 {rules: "drop"},
		"by port":                 {rules: "port 443 reject;port 80 via b", want: "reply", dials: []string{"b 203.0.113.9:80:80"}},
		"by owner":                {rules: "user 1000 via b"},
	} {
		t.Run(name, func(t *testing.T) {
			var rules []string
			if tt.rules != "" {
				rules = strings.Split(tt.rules, ";")
			}
			e := newEchoRig(t, Config{}, func(d Dest) (error, bool) {
				if d.Addr.Port() == 443 {
					return tt.at443, true
				}
				return tt.at80, true
			}, rules...)
			if !e.ping(echoDst, "x") {
				t.Fatal("the request was not taken")
			}
			testkit.Eventually(t, "the outcome", func() bool {
				s := e.Stats()
				return s.EchoReplies+s.EchoesRefused+s.EchoesSilent == 1
			})
			var want []string
			if tt.want != "" {
				want = []string{tt.want + " x"}
			}
			if got := e.all(); !slices.Equal(got, want) {
				t.Errorf("the answers are %q, want %q", got, want)
			}
			if d := e.dials(); !slices.Equal(d, tt.dials) {
				t.Errorf("dialled %q, want %q", d, tt.dials)
			}
			if s := e.Stats(); s.Echoes != 1 || int(s.EchoDials) != len(tt.dials) {
				t.Errorf("%d requests and %d dials are counted", s.Echoes, s.EchoDials)
			}
		})
	}
}

// TestEchoSilent: each port has its time. Nothing is answered, and the next request soon after does not dial again.
func TestEchoSilent(t *testing.T) {
	e := newEchoRig(t, Config{}, func(Dest) (error, bool) { return nil, false })
	e.ping(echoDst, "x")
	testkit.Eventually(t, "both ports to be tried", func() bool { return e.Stats().EchoesSilent == 1 })
	if d := e.dials(); len(d) != 2 || len(e.all()) != 0 {
		t.Errorf("dialled %q, answered %q", d, e.all())
	}
}

// TestEchoShares: requests to one destination wait for one dial, and its outcome is valid for those that come soon. Requests
// over the limit are counted. When the outcome is old, it is asked again.
func TestEchoShares(t *testing.T) {
	gate := make(chan struct{})
	e := newEchoRig(t, Config{}, func(Dest) (error, bool) { <-gate; return socks.ReplyRefused, true })
	e.echo.wait = time.Hour
	const over = 5
	for i := range echoWaiting + over {
		e.ping(echoDst, fmt.Sprint(i))
	}
	s := e.Stats()
	close(gate)
	if s.EchoDials != 1 || s.EchoesLimited != over || s.Echoes != echoWaiting+over {
		t.Errorf("%d dials, %d of %d over the limit", s.EchoDials, s.EchoesLimited, s.Echoes)
	}
	testkit.Eventually(t, "the answers", func() bool { return len(e.all()) == echoWaiting })
	for i, a := range e.all() {
		if a != fmt.Sprint("reply ", i) {
			t.Errorf("answer %d is %q", i, a)
		}
	}
	e.echo.mu.Lock()
	e.echo.dests[echoKey{echoSrc, echoDst}].until = e.now() + int64(time.Hour)
	e.echo.mu.Unlock()
	e.ping(echoDst, "known")
	if got := e.all(); got[len(got)-1] != "reply known" || e.Stats().EchoDials != 1 {
		t.Errorf("the last answer is %q after %d dials", got[len(got)-1], e.Stats().EchoDials)
	}
	e.echo.mu.Lock()
	e.echo.dests[echoKey{echoSrc, echoDst}].until = e.now()
	e.echo.mu.Unlock()
	e.ping(echoDst, "old")
	testkit.Eventually(t, "another dial", func() bool { return len(e.all()) == echoWaiting+2 && e.Stats().EchoDials == 2 })
}

// TestEchoBounds: however many requests come to however many destinations, there is a limit to what is asked and held. Ending
// ends the dials.
func TestEchoBounds(t *testing.T) {
	e := newEchoRig(t, Config{}, func(Dest) (error, bool) { return nil, false })
	e.echo.wait = time.Hour
	big := string(bytes.Repeat([]byte("x"), 60000))
	const requests = 3000
	for i := range requests {
		e.ping(netip.AddrFrom4([4]byte{203, 0, 113, byte(i % 250)}), big)
	}
	e.echo.mu.Lock()
	pending, held, known := e.echo.pending, e.echo.bytes, len(e.echo.dests)
	e.echo.mu.Unlock()
	if pending == 0 || pending > echoDials || held > echoBytes || known > echoDests {
		t.Errorf("%d destinations are being asked, %d known, %d bytes are held", pending, known, held)
	}
	s := e.Stats()
	if s.Echoes != requests || s.EchoesLimited < requests-echoBytes/60000-1 || s.EchoDials > echoDials {
		t.Errorf("%d requests, %d over a limit, %d dials", s.Echoes, s.EchoesLimited, s.EchoDials)
	}
}

// TestEchoRates: the number of requests and of destinations in a second is limited.
func TestEchoRates(t *testing.T) {
	s := &shard{Router: &Router{}}
	s.epoch = time.Now()
	table := &s.echo
	second := func(f func()) (asked int) {
		testkit.Eventually(t, "a whole second for the test", func() bool {
			table.dests, table.second = nil, -1
			at := s.now() / int64(time.Second)
			f()
			return at == s.now()/int64(time.Second)
		})
		return table.asked
	}
	if n := second(func() {
		for i := range 2 * echoDialing {
			askEcho(s, i)
		}
	}); n != echoDialing {
		t.Errorf("%d destinations were asked in a second", n)
	}
	answered := 0
	second(func() {
		answered = 0
		for range 2 * echoRate {
			if _, _, ok := table.take(s, flow.Echo{Src: echoSrc, Dst: echoDst}, []uint16{1}); ok {
				answered++
			}
			table.mu.Lock()
			for _, d := range table.dests {
				if d.until == 0 {
					d.until = s.now() + int64(time.Hour)
					table.pending--
					table.wg.Done()
				}
			}
			table.mu.Unlock()
		}
	})
	if answered != echoRate {
		t.Errorf("%d requests were taken in a second", answered)
	}
}

// askEcho asks destination number i, whose outcome is known at once.
func askEcho(s *shard, i int) (isNew bool) {
	table := &s.echo
	dst := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
	d, known, ok := table.take(s, flow.Echo{Src: echoSrc, Dst: dst}, []uint16{1})
	if !ok || known || d == nil {
		return false
	}
	table.mu.Lock()
	defer table.mu.Unlock()
	d.until = s.now() + int64(time.Hour)
	table.pending--
	table.wg.Done()
	return true
}

// TestEchoKnown: the number of known outcomes is limited, and old ones make room.
func TestEchoKnown(t *testing.T) {
	s := &shard{Router: &Router{}}
	s.epoch = time.Now()
	table := &s.echo
	for i := range 4 * echoDests {
		table.second = -1
		askEcho(s, i)
	}
	if n := len(table.dests); n > echoDests {
		t.Errorf("%d destinations are known", n)
	}
	for _, d := range table.dests {
		d.until = 1 // long ago
	}
	table.second = -1
	if !askEcho(s, 5*echoDests) {
		t.Error("old outcomes do not make room")
	}
}

// TestEchoOff: a router that was not asked to answer does not take requests, and SetPing changes that.
func TestEchoOff(t *testing.T) {
	e := newEchoRig(t, Config{}, func(Dest) (error, bool) { return nil, true })
	e.SetPing(nil)
	if e.ping(echoDst, "x") || e.Stats().Echoes != 0 {
		t.Error("the request was taken")
	}
	e.SetPing([]uint16{80})
	if !e.ping(echoDst, "x") {
		t.Error("the request was not taken")
	}
	testkit.Eventually(t, "the answer", func() bool { return len(e.all()) == 1 })
}

// TestEchoFake: a fake address stands for its name, and one that stands for none is unreachable.
func TestEchoFake(t *testing.T) {
	pool, err := dns.NewPool(dns.PoolConfig{V4: flow.Pool4, V6: flow.Pool6, TTL: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	a, _, _ := pool.Give([]byte("name.example"))
	e := newEchoRig(t, Config{Pool: pool}, func(Dest) (error, bool) { return nil, true })
	e.ping(a, "x")
	testkit.Eventually(t, "the answer", func() bool { return len(e.all()) == 1 })
	if d := e.dials(); !slices.Equal(d, []string{"a name.example:443"}) {
		t.Errorf("dialled %q", d)
	}
	e.ping(a.Next(), "y")
	testkit.Eventually(t, "the answer", func() bool { return len(e.all()) == 2 })
	if got := e.all()[1]; !strings.Contains(got, "host") {
		t.Errorf("an address without a name: %q", got)
	}
}
