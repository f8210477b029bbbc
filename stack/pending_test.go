package stack

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// fakeSockets answers for the app's kernel.
type fakeSockets struct {
	gone  atomic.Bool
	err   error
	asked atomic.Int32
}

func (f *fakeSockets) Exists(p flow.Proto, src, dst netip.AddrPort) (bool, error) {
	f.asked.Add(1)
	if p != flow.TCP || !src.IsValid() || !dst.IsValid() {
		panic("asked for something else")
	}
	return !f.gone.Load(), f.err
}

func (f *fakeSockets) Forwards() bool { return false }

func (f *fakeSockets) BoundUDP(func(netip.AddrPort)) error {
	panic("the stack has no UDP sockets to ask about")
}

// tableTest is a table whose stack only writes down what it is told.
type tableTest struct {
	t       *testing.T
	tab     *pendingTable
	stats   counters
	opens   []*pendingSYN
	aborts  int
	shake   shakeState
	answers []flow.Refusal
	cancels int
}

func newTableTest(t *testing.T, l Limits, s flow.Sockets) *tableTest {
	x := &tableTest{t: t}
	x.tab = newPendingTable(l, newBudget(), s, &x.stats)
	x.tab.open = func(e *pendingSYN, p *gstack.PacketBuffer) {
		p.DecRef()
		x.opens = append(x.opens, e)
		x.tab.shaking.Done()
	}
	x.tab.abort = func(tuple) { x.aborts++ }
	x.tab.shake = func(tuple) shakeState { return x.shake }
	x.tab.answer = func(_ []byte, why flow.Refusal) { x.answers = append(x.answers, why) }
	return x
}

func key(src, dst string) tuple {
	return tuple{netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)}
}

var key1 = key("10.0.0.2:1000", "203.0.113.7:80")

func (x *tableTest) syn(k tuple, isn uint32) *pendingSYN {
	p := gstack.NewPacketBuffer(gstack.PacketBufferOptions{
		Payload:   buffer.MakeWithData(make([]byte, 60)),
		OnRelease: func() {},
	})
	p.NetworkHeader().Consume(20)
	p.TransportHeader().Consume(20)
	defer p.DecRef()
	r := x.tab.syn(k, isn, p)
	if r != nil {
		r.OnCancel(func() { x.cancels++ })
	}
	return r
}

func (x *tableTest) expect(what string, entries, waiting, cancels int, answers ...flow.Refusal) {
	x.t.Helper()
	synctest.Wait()
	x.tab.mu.Lock()
	defer x.tab.mu.Unlock()
	if len(x.tab.byKey) != entries || x.tab.waiting != waiting || x.cancels != cancels ||
		fmt.Sprint(x.answers) != fmt.Sprint(answers) {
		x.t.Fatalf("%s: %d entries, %d waiting, %d cancelled, answers %v; want %d, %d, %d, %v", what,
			len(x.tab.byKey), x.tab.waiting, x.cancels, x.answers, entries, waiting, cancels, answers)
	}
	if n := x.stats.pending.Load(); n != int64(waiting) {
		x.t.Fatalf("%s: %d pending by the counter, %d by the table", what, n, waiting)
	}
	sum := 0
	for i := range x.tab.budget.dests {
		for _, n := range x.tab.budget.dests[i].n {
			sum += n
		}
	}
	if sum != waiting || len(x.tab.heap) != entries {
		x.t.Fatalf("%s: %d for the destinations, %d in the heap", what, sum, len(x.tab.heap))
	}
}

// pendingCase is something that happens to a table, and what must follow.
type pendingCase struct {
	limits  Limits
	sockets *fakeSockets
	run     func(x *tableTest, s *fakeSockets)
}

func runPending(t *testing.T, tests map[string]pendingCase) {
	t.Helper()
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var s flow.Sockets
				if tt.sockets != nil {
					s = tt.sockets
				}
				x := newTableTest(t, tt.limits, s)
				tt.run(x, tt.sockets)
				x.tab.close()
			})
		})
	}
}

// TestPendingRepeats: a SYN that comes again, or no more, and a RST.
func TestPendingRepeats(t *testing.T) {
	runPending(t, map[string]pendingCase{
		"a SYN that comes again starts no second dial": {run: func(x *tableTest, _ *fakeSockets) {
			if x.syn(key1, 1) == nil {
				x.t.Fatal("no request")
			}
			for _, gap := range []int{1, 1, 1, 1, 2, 4, 8} {
				testkit.Advance(time.Duration(gap) * time.Second)
				if x.syn(key1, 1) != nil {
					x.t.Fatal("a second request")
				}
			}
			x.expect("after 18 s", 1, 1, 0)
		}},
		"another ISN replaces": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1)
			if x.syn(key1, 2) == nil {
				x.t.Fatal("no request")
			}
			x.expect("replaced", 1, 1, 1)
			if n := x.stats.Replaced.Load(); n != 1 {
				x.t.Fatalf("%d replaced", n)
			}
		}},
		"without sockets the silence tells": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1)
			testkit.Advance(2900 * time.Millisecond)
			x.expect("twice the first gap and a second are not over", 1, 1, 0)
			testkit.Advance(200 * time.Millisecond)
			x.expect("over", 0, 0, 1)
		}},
		"without sockets and a SYN that came late": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1)
			testkit.Advance(2 * time.Second)
			x.syn(key1, 1)
			testkit.Advance(4900 * time.Millisecond)
			x.expect("2*2+1 s are not over", 1, 1, 0)
			testkit.Advance(200 * time.Millisecond)
			x.expect("over", 0, 0, 1)
		}},
		"RST cancels": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 100)
			if x.tab.rst(key1, 50) || x.tab.rst(key("10.0.0.2:1", "203.0.113.7:80"), 101) {
				x.t.Fatal("a RST for something else")
			}
			x.expect("wrong", 1, 1, 0)
			if !x.tab.rst(key1, 101) {
				x.t.Fatal("not taken")
			}
			x.expect("right", 0, 0, 1)
		}},
	})
}

// TestPendingSockets: the app's kernel is asked whether the socket is there.
func TestPendingSockets(t *testing.T) {
	runPending(t, map[string]pendingCase{
		"the socket is asked for at the first missed retransmission": {
			sockets: new(fakeSockets),
			run: func(x *tableTest, s *fakeSockets) {
				x.syn(key1, 1)
				testkit.Advance(1200 * time.Millisecond)
				if s.asked.Load() != 0 {
					x.t.Fatal("asked too early")
				}
				s.gone.Store(true)
				testkit.Advance(100 * time.Millisecond)
				x.expect("gone", 0, 0, 1)
			},
		},
		"not asked while SYNs come": {sockets: new(fakeSockets), run: func(x *tableTest, s *fakeSockets) {
			x.syn(key1, 1)
			for range 4 {
				testkit.Advance(time.Second)
				x.syn(key1, 1)
			}
			testkit.Advance(2 * time.Second)
			x.syn(key1, 1)
			if n := s.asked.Load(); n != 0 {
				x.t.Fatalf("asked %d times", n)
			}
		}},
		"asked every few seconds": {sockets: new(fakeSockets), run: func(x *tableTest, s *fakeSockets) {
			x.syn(key1, 1)
			testkit.Advance(time.Minute)
			x.expect("it is there", 1, 1, 0)
			if n := s.asked.Load(); n < 10 || n > 20 {
				x.t.Fatalf("asked %d times in a minute", n)
			}
			s.gone.Store(true)
			testkit.Advance(askEvery)
			x.expect("gone", 0, 0, 1)
		}},
		"sockets that can't be asked": {sockets: &fakeSockets{err: errors.New("no")}, run: func(x *tableTest, s *fakeSockets) {
			x.syn(key1, 1)
			testkit.Advance(2900 * time.Millisecond)
			x.expect("silence does not tell yet", 1, 1, 0)
			testkit.Advance(200 * time.Millisecond)
			x.expect("over", 0, 0, 1)
		}},
	})
}

// TestPendingBudget: what is over a limit is forgotten.
func TestPendingBudget(t *testing.T) {
	runPending(t, map[string]pendingCase{
		"budget in all": {limits: Limits{Pending: 2}, run: func(x *tableTest, _ *fakeSockets) {
			a := x.syn(key("10.0.0.2:1", "203.0.113.1:80"), 1)
			x.syn(key("10.0.0.2:2", "203.0.113.2:80"), 1)
			k3 := key("10.0.0.2:3", "203.0.113.3:80")
			if x.syn(k3, 1) != nil {
				x.t.Fatal("over the budget")
			}
			x.expect("full", 2, 2, 0)
			a.Reject(flow.RefuseSilent)
			if x.syn(k3, 1) == nil {
				x.t.Fatal("the next SYN is a new try")
			}
			if n := x.stats.OverBudget.Load(); n != 1 {
				x.t.Fatalf("%d counted", n)
			}
		}},
		"budget for a destination": {limits: Limits{PendingPerDest: 1}, run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1)
			if x.syn(key("10.0.0.2:2", "203.0.113.7:81"), 1) != nil {
				x.t.Fatal("over the budget")
			}
			if x.syn(key("10.0.0.2:2", "203.0.113.8:80"), 1) == nil {
				x.t.Fatal("another address starves")
			}
			if n := x.stats.OverDestBudget.Load(); n != 1 {
				x.t.Fatalf("%d counted", n)
			}
		}},
		"refusals don't grow without bound": {limits: Limits{Pending: 2}, run: func(x *tableTest, _ *fakeSockets) {
			for i := range 100 {
				x.syn(tuple{netip.AddrPortFrom(appIP4, uint16(i+1)), srv4}, 1).Reject(flow.RefuseSilent)
			}
			x.expect("many", 8, 0, 0)
		}},
	})
}

// TestPendingAccept: a request that is accepted.
func TestPendingAccept(t *testing.T) {
	runPending(t, map[string]pendingCase{
		"accept": {run: func(x *tableTest, _ *fakeSockets) {
			r := x.syn(key1, 1)
			r.Accept(newTestConn())
			r.Accept(newTestConn())
			r.Reject(flow.RefuseHost)
			if x.syn(key1, 1) != nil || x.syn(key1, 2) != nil {
				x.t.Fatal("the handshake is under way")
			}
			x.expect("opening", 1, 0, 0)
			if len(x.opens) != 1 {
				x.t.Fatalf("opened %d times", len(x.opens))
			}
			if x.tab.take(r.key) != r || x.tab.take(r.key) != nil {
				x.t.Fatal("the entry is not handed out once")
			}
			x.expect("opened", 0, 0, 0)
		}},
		"a handshake that hangs is ended": {run: func(x *tableTest, _ *fakeSockets) {
			r := x.syn(key1, 1)
			r.Accept(newTestConn())
			testkit.Advance(openTime + time.Second)
			if x.aborts != 1 {
				x.t.Fatalf("aborted %d times", x.aborts)
			}
			x.tab.take(r.key)
		}},
		"accept after the app gave up": {run: func(x *tableTest, _ *fakeSockets) {
			r := x.syn(key1, 1)
			x.tab.rst(key1, 2)
			called := false
			r.OnCancel(func() { called = true })
			if !called {
				x.t.Fatal("OnCancel was not called at once")
			}
			c := newTestConn()
			r.Accept(c)
			if err := c.opened(); !errors.Is(err, ErrAppGone) {
				x.t.Fatalf("Opened: %v", err)
			}
			r.Accept(c)
			synctest.Wait()
			if c.n != 1 {
				x.t.Fatalf("Opened %d times", c.n)
			}
			r.Reject(flow.RefuseHost)
			x.expect("nothing follows", 0, 0, 1)
		}},
	})
}

// TestPendingRefused: a request that is refused, and the end of the table.
func TestPendingRefused(t *testing.T) {
	runPending(t, map[string]pendingCase{
		"the answer is given again": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1).Reject(flow.RefuseHost)
			x.expect("refused", 1, 0, 0, flow.RefuseHost)
			testkit.Advance(time.Second)
			x.syn(key1, 1)
			x.expect("again", 1, 0, 0, flow.RefuseHost, flow.RefuseHost)
			if x.syn(key1, 2) == nil {
				x.t.Fatal("another ISN is another connection")
			}
			x.expect("new", 1, 1, 0, flow.RefuseHost, flow.RefuseHost)
		}},
		"a refused entry ends": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1).Reject(flow.RefuseReset)
			testkit.Advance(3100 * time.Millisecond)
			x.expect("over", 0, 0, 0, flow.RefuseReset)
		}},
		"a tombstone swallows until the SYNs end": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1).Reject(flow.RefuseSilent)
			for gap := time.Second; gap <= 64*time.Second; gap *= 2 {
				testkit.Advance(gap)
				if x.syn(key1, 1) != nil {
					x.t.Fatal("dialled again")
				}
			}
			x.expect("after 127 s", 1, 0, 0)
			testkit.Advance(130 * time.Second)
			x.expect("over", 0, 0, 0)
		}},
		"OnCancel is not called after Reject": {run: func(x *tableTest, _ *fakeSockets) {
			r := x.syn(key1, 1)
			r.Reject(flow.RefuseNet)
			x.tab.rst(key1, 2)
			r.OnCancel(func() { x.t.Error("called") })
			x.expect("refused", 1, 0, 0, flow.RefuseNet)
		}},
		"the stop order refuses": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1)
			x.tab.refuseAll()
			x.expect("what waited", 0, 0, 1, flow.RefuseReset)
			if x.syn(key1, 2) != nil {
				x.t.Fatal("a new request")
			}
			x.expect("what comes", 0, 0, 1, flow.RefuseReset, flow.RefuseReset)
		}},
		"close cancels": {run: func(x *tableTest, _ *fakeSockets) {
			x.syn(key1, 1)
			x.syn(key("10.0.0.2:2", "203.0.113.2:80"), 1).Reject(flow.RefuseSilent)
			x.tab.close()
			x.expect("closed", 0, 0, 1)
			if x.syn(key1, 2) != nil {
				x.t.Fatal("a request after close")
			}
		}},
	})
}

// TestPendingNoGoroutines: thousands of dials pending cost no goroutine.
func TestPendingNoGoroutines(t *testing.T) {
	testkit.CheckLeaks(t)
	synctest.Test(t, func(t *testing.T) {
		s := new(fakeSockets)
		x := newTableTest(t, Limits{}, s)
		for i := range 5000 {
			if x.syn(
				tuple{
					netip.AddrPortFrom(appIP4, uint16(i+1)),
					netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 80),
				},
				1,
			) == nil {
				t.Fatal("no request")
			}
		}
		testkit.Advance(10 * time.Second)
		x.expect("pending", 5000, 5000, 0)
		s.gone.Store(true)
		testkit.Advance(10 * time.Second)
		x.expect("gone", 0, 0, 5000)
		if x.tab.peak > remake || cap(x.tab.heap) > remake {
			t.Error("what the burst made is kept")
		}
		x.tab.close()
	})
}

// A zero means the same to Set as to New: the default.
func TestSetDefaults(t *testing.T) {
	ours, theirs := tuntest.Pipe(1500, 0)
	defer theirs.Close()
	s, err := New(Config{Device: ours, Handler: &testHandler{}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := Limits{Pending: DefaultPending, PendingPerDest: DefaultPendingPerDest}
	for range 2 {
		if s.shards[0].pending.limits != want || s.keepalive.Load() != int64(DefaultKeepalive) {
			t.Errorf("%+v, keepalive %v", s.shards[0].pending.limits, time.Duration(s.keepalive.Load()))
		}
		s.Set(Limits{Pending: 2, PendingPerDest: 1}, time.Minute)
		if s.shards[0].pending.limits.Pending != 2 || s.keepalive.Load() != int64(time.Minute) {
			t.Errorf("set: %+v, keepalive %v", s.shards[0].pending.limits, time.Duration(s.keepalive.Load()))
		}
		s.Set(Limits{}, 0)
	}
}
