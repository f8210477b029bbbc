package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"
)

var (
	notReachedErr = &ServerError{Server: "s", Op: OpConnect, Err: syscall.ECONNREFUSED}
	eofErr        = &ServerError{Server: "s", Op: OpHandshake, Err: io.ErrUnexpectedEOF}
	loginErr      = &ServerError{Server: "s", Op: OpAuthenticate, Err: ErrCredentials}
)

func newChooser(t testing.TB, n int, o GroupOptions) *chooser {
	t.Helper()
	if err := o.fill(); err != nil {
		t.Fatal(err)
	}
	c := &chooser{opts: o, servers: make([]health, n)}
	for i := range n {
		c.names = append(c.names, fmt.Sprintf("s%d", i))
	}
	return c
}

// eventCase is what the end of an attempt means.
type eventCase struct {
	name   string
	err    error
	counts bool
	next   bool // at another server
	again  bool // at the same one, while it has attempts
}

// The event table, row by row: what counts against a server, and whether the flow goes on.
func TestEvents(t *testing.T) {
	for _, tt := range []eventCase{
		{"not reached", notReachedErr, true, true, true},
		{"name not found", &ServerError{Op: OpResolve, Err: errNoAddrs}, true, true, true},
		{"EOF before the request", eofErr, true, true, false},
		{"timeout before the request", &ServerError{Op: OpHandshake, Err: context.DeadlineExceeded}, true, true, false},
		{"garbage", &ServerError{Op: OpHandshake, Err: ErrMalformed}, true, true, false},
		{"method 0xFF", &ServerError{Op: OpAuthenticate, Err: ErrMethod}, true, true, false},
		{"credentials", loginErr, true, true, false},
		{"reply 1", ReplyGeneralFailure, false, false, false},
		{"reply 2", ReplyNotAllowed, false, false, false},
		{"reply 3", ReplyNetUnreachable, false, false, false},
		{"reply 4", ReplyHostUnreachable, false, false, false},
		{"reply 5", ReplyRefused, false, false, false},
		{"reply 6", ReplyTTLExpired, false, false, false},
		{"FIN after the request", ErrEnded, false, false, false},
		{"silence after the request", ErrSilent, false, false, false},
		{"late reply 1", fmt.Errorf("%w: %w", ErrLate, ReplyGeneralFailure), false, false, false},
		{"reply 7", ReplyCommandNotSupported, false, true, false},
		{"reply 8", ReplyAddrTypeNotSupported, false, true, false},
		{"no words for it", ErrCannotExpress, false, true, false},
		{"success", nil, false, false, false},
		{"the program gave up", context.Canceled, false, false, false},
		{"no descriptors here", syscall.EMFILE, false, false, false},
	} {
		tt.check(t)
	}
}

var eventDst = Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 80}

func (tt eventCase) check(t *testing.T) {
	t.Helper()
	c := newChooser(t, 3, GroupOptions{ServerAttempts: 2})
	c.servers[0].fault(&c.opts, 0, notReachedErr) // one from before, which a success clears
	var a attempt
	c.begin(&a, CmdConnect, netip.Addr{}, eventDst)
	now := time.Second
	if i, ok := c.next(&a, now); i != 0 || !ok {
		t.Fatal(i, ok)
	}
	o := c.done(&a, 0, tt.err, now)
	if o.wentDown != tt.counts || c.servers[0].isDown != tt.counts {
		t.Errorf("%s: down is %v", tt.name, c.servers[0].isDown)
	}
	if o.again != (tt.next || tt.again) {
		t.Errorf("%s: the flow goes on: %v", tt.name, o.again)
	}
	if !o.again && o.err != tt.err {
		t.Errorf("%s: the flow ends with %v", tt.name, o.err)
	}
	if tt.err == nil && len(c.servers[0].faults) > 0 {
		t.Errorf("%s does not clear the count", tt.name)
	}
	if !o.again {
		return
	}
	// The first server is down where it counts; so look at whether it would be asked again were it not.
	c.servers[0].isDown = false
	i, ok := c.next(&a, now)
	if want := map[bool]int{true: 0, false: 1}[tt.again]; i != want || !ok {
		t.Errorf("%s: server %d is next, %v", tt.name, i, ok)
	}
	tt.checkLater(t, c, now)
}

// checkLater checks where the flows after that begin.
func (tt eventCase) checkLater(t *testing.T, c *chooser, now time.Duration) {
	t.Helper()
	first := func(dst Addr, now time.Duration) int {
		var a attempt
		c.begin(&a, CmdConnect, netip.Addr{}, dst)
		i, _ := c.next(&a, now)
		return i
	}
	i := first(eventDst, now)
	var r Reply
	if remembered := errors.As(tt.err, &r); remembered != (i == 1) {
		t.Errorf("%s: the next flow begins at %d", tt.name, i)
	}
	if i := first(Addr{Name: "name", Port: 80}, now); (tt.err == ReplyCommandNotSupported) != (i == 1) {
		t.Errorf("%s: a flow of another address type begins at %d", tt.name, i)
	}
	if i := first(eventDst, now+unableFor); i != 0 {
		t.Errorf("%s: it is remembered for more than %v", tt.name, unableFor)
	}
}

// What a flow that no server carried ends with.
func TestGroupFailure(t *testing.T) {
	for _, tt := range []struct {
		name string
		cmd  Command
		errs []error // of each server; nil: it is down
		want error
	}{
		{"all down", CmdConnect, []error{nil, nil}, ErrAllDown},
		{"the last fault", CmdConnect, []error{notReachedErr, eofErr}, eofErr},
		{"no IPv6 anywhere", CmdConnect, []error{ReplyAddrTypeNotSupported, ReplyAddrTypeNotSupported},
			ReplyAddrTypeNotSupported},
		{"no IPv6 at what works", CmdConnect, []error{nil, ReplyAddrTypeNotSupported}, ReplyAddrTypeNotSupported},
		{"no UDP anywhere", CmdAssociate, []error{ReplyCommandNotSupported, ReplyCommandNotSupported}, ReplyCommandNotSupported},
		{"no UDP at what works", CmdAssociate, []error{nil, ReplyCommandNotSupported}, ErrAllDown},
		{"no room for an association", CmdAssociate, []error{ReplyGeneralFailure, ReplyCommandNotSupported}, ReplyGeneralFailure},
		{"no answer to ASSOCIATE", CmdAssociate, []error{ErrEnded, ReplyCommandNotSupported}, ErrEnded},
	} {
		c := newChooser(t, len(tt.errs), GroupOptions{FailThreshold: 1})
		for i, err := range tt.errs {
			if err == nil {
				c.servers[i].fault(&c.opts, 0, notReachedErr)
			}
		}
		var a attempt
		c.begin(&a, tt.cmd, netip.Addr{}, testDst)
		for {
			i, ok := c.next(&a, 1)
			if !ok {
				break
			}
			if o := c.done(&a, i, tt.errs[i], 1); !o.again {
				t.Errorf("%s: the flow ends at server %d with %v", tt.name, i, o.err)
				break
			}
		}
		if err := a.failure("g"); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// FIN in place of an answer is the target's refusal until a server has never done anything else.
func TestAlwaysEnds(t *testing.T) {
	for _, first := range []error{nil, ReplyRefused, ErrEnded} {
		c := newChooser(t, 1, GroupOptions{})
		at := 0
		for i := range 3 * fromEndedOn {
			var a attempt
			c.begin(&a, CmdConnect, netip.Addr{}, Addr{IP: testDst.IP, Name: fmt.Sprint(i / 2), Port: 1})
			c.next(&a, 1)
			err := ErrEnded
			if first != ErrEnded && i%fromEndedOn == 0 {
				err = first
			}
			if o := c.done(&a, 0, err, 1); o.again && at == 0 {
				at = i + 1
			}
		}
		if want := map[bool]int{true: fromEndedOn, false: 0}[first == ErrEnded]; at != want {
			t.Errorf("%v, and then %v: a fault at request %d, want %d", first, ErrEnded, at, want)
		}
	}
}

// Silence is the target's, unless a server answers nobody and another one could.
func TestAlwaysSilent(t *testing.T) {
	for _, tt := range []struct {
		servers, targets int
		answers, down    bool
	}{{1, 100, false, false}, {2, 100, false, true}, {2, 1, false, false}, {2, 100, true, false}} {
		c := newChooser(t, tt.servers, GroupOptions{FailThreshold: 1})
		for i := range 20 {
			var a attempt
			c.begin(&a, CmdConnect, netip.Addr{}, Addr{Name: fmt.Sprint(i % tt.targets), Port: 1})
			begin := time.Duration(i) * time.Minute
			if s, _ := c.next(&a, begin); s != 0 {
				break
			}
			if tt.answers {
				c.servers[0].heard(begin + time.Second)
			}
			if o := c.done(&a, 0, ErrSilent, begin+30*time.Second); o.again || !errors.Is(o.err, ErrSilent) {
				t.Errorf("%+v", o)
			}
		}
		if c.servers[0].isDown != tt.down {
			t.Errorf("%+v: down is %v", tt, c.servers[0].isDown)
		}
	}
}

func TestSelect(t *testing.T) {
	for _, s := range []Select{Ordered, RoundRobin, Hash, Latched} {
		c := newChooser(t, 4, GroupOptions{Select: s, FailThreshold: 1})
		counts := firsts(t, c, 200, manyDsts)
		switch s {
		case Ordered, Latched:
			if counts[0] != 200 {
				t.Errorf("%v: %v", s, counts)
			}
		case RoundRobin:
			if counts != [4]int{50, 50, 50, 50} {
				t.Errorf("%v: %v", s, counts)
			}
		case Hash:
			if slices.Min(counts[:]) < 20 {
				t.Errorf("%v: %v", s, counts)
			}
			hashStays(t, c)
		}
		if back, err := ParseSelect(s.String()); back != s || err != nil {
			t.Error(s, back, err)
		}
	}
}

// hashStays wants a pair of endpoints to keep its server, also when another server goes down.
func hashStays(t *testing.T, c *chooser) {
	t.Helper()
	if n := firsts(t, c, 50, oneDst); slices.Max(n[:]) != 50 {
		t.Errorf("one pair goes to %v", n)
	}
	before := map[int]int{}
	for i := range 200 {
		var a attempt
		c.begin(&a, CmdConnect, netip.Addr{}, manyDsts(i))
		before[i], _ = c.next(&a, 1)
	}
	c.servers[2].fault(&c.opts, 1, notReachedErr)
	for i := range 200 {
		var a attempt
		c.begin(&a, CmdConnect, netip.Addr{}, manyDsts(i))
		if s, _ := c.next(&a, 1); before[i] != 2 && s != before[i] || s == 2 {
			t.Errorf("pair %d went from %d to %d", i, before[i], s)
		}
	}
}

// The latch stays where the last failover landed, and a request that one server cannot carry does not move it.
func TestSelectLatched(t *testing.T) {
	c := newChooser(t, 3, GroupOptions{Select: Latched, FailThreshold: 1})
	var a attempt
	c.begin(&a, CmdConnect, netip.Addr{}, testDst)
	c.next(&a, 1)
	c.done(&a, 0, ReplyAddrTypeNotSupported, 1)
	i, _ := c.next(&a, 1)
	c.done(&a, i, nil, 1)
	if c.latched != 0 {
		t.Errorf("latched at %d", c.latched)
	}
	c.servers[0] = health{}
	a = attempt{}
	c.begin(&a, CmdConnect, netip.Addr{}, testDst)
	c.next(&a, 1)
	c.done(&a, 0, notReachedErr, 1)
	i, _ = c.next(&a, 1)
	c.done(&a, i, nil, 1)
	c.servers[0].tried(&c.opts, 2, nil)
	if got := firsts(t, c, 10, oneDst); got[1] != 10 {
		t.Errorf("after the failover: %v", got)
	}
}

// firsts counts which server is asked first for each of n flows.
func firsts(t *testing.T, c *chooser, n int, dst func(i int) Addr) (counts [4]int) {
	t.Helper()
	for i := range n {
		var a attempt
		c.begin(&a, CmdConnect, netip.MustParseAddr("10.0.0.1"), dst(i))
		s, ok := c.next(&a, 1)
		if !ok {
			t.Fatal("nobody is asked")
		}
		counts[s]++
		order := slices.Clone(a.order[:len(c.servers)])
		slices.Sort(order)
		if len(slices.Compact(order)) != len(c.servers) {
			t.Fatalf("order %v", a.order)
		}
	}
	return counts
}

func oneDst(int) Addr { return testDst }

func manyDsts(i int) Addr {
	return Addr{IP: netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), Port: 80}
}

// model is what the accounting must come to, told in another way: a list of what happened to one server.
type model struct {
	faults    []time.Duration // since the last success
	down      bool
	probation bool
	since     time.Duration // down, or the last failed trial
	trying    bool
}

func (m *model) fault(o *GroupOptions, now time.Duration) {
	if m.down {
		return
	}
	m.faults = append(m.faults, now)
	recent := 0
	for _, f := range m.faults {
		if now-f <= o.FailWindow {
			recent++
		}
	}
	if recent >= o.FailThreshold || m.probation {
		*m = model{down: true, since: now, trying: m.trying}
	}
}

// Under random events no server is used while it is down, but for its one trial after RetryAfter, and no flow makes more attempts
// than it may.
func TestAccountingProperty(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		n := 2 + rnd.IntN(4)
		o := GroupOptions{
			Select: Select(rnd.IntN(4)), ServerAttempts: 1 + rnd.IntN(3), Attempts: 1 + rnd.IntN(6),
			FailThreshold: 1 + rnd.IntN(4), FailWindow: 10 * time.Second, RetryAfter: time.Duration(1+rnd.IntN(20)) * time.Second,
		}
		x := accounting{t: t, seed: seed, rnd: rnd, o: o, c: newChooser(t, n, o), want: make([]model, n)}
		for range 400 {
			x.now += time.Duration(rnd.IntN(1500)) * time.Millisecond
			switch p := rnd.IntN(10); {
			case p < 3:
				f := &accounted{asked: map[int]int{}}
				x.c.begin(&f.a, CmdConnect, netip.Addr{}, Addr{Name: fmt.Sprint(rnd.IntN(50)), Port: 1})
				x.flows = append(x.flows, f)
				x.step(f)
			case p < 8 && len(x.flows) > 0:
				x.outcome(x.flows[rnd.IntN(len(x.flows))])
			default:
				x.trial(rnd.IntN(n))
			}
			for i := range x.want {
				if x.c.servers[i].isDown != x.want[i].down {
					t.Fatalf("seed %d at %v: server %d is down: %v, want %v", seed, x.now, i, x.c.servers[i].isDown,
						x.want[i].down)
				}
			}
		}
	}
}

// accounting is a chooser under random events, and what it should think of its servers.
type accounting struct {
	t     *testing.T
	seed  uint64
	rnd   *rand.Rand
	o     GroupOptions
	c     *chooser
	want  []model
	flows []*accounted
	now   time.Duration
}

// accounted is a flow and its attempts.
type accounted struct {
	a      attempt
	server int
	asked  map[int]int
	all    int
}

func (x *accounting) over(f *accounted) {
	x.flows = slices.DeleteFunc(x.flows, func(y *accounted) bool { return y == f })
}

// step is the next attempt of a flow.
func (x *accounting) step(f *accounted) {
	x.t.Helper()
	i, ok := x.c.next(&f.a, x.now)
	if !ok {
		x.over(f)
		if err := f.a.failure("g"); err == nil {
			x.t.Fatal("a flow ends without a reason")
		}
		return
	}
	f.server, f.all = i, f.all+1
	f.asked[i]++
	if x.want[i].down {
		x.t.Fatalf("seed %d: server %d is used while it is down", x.seed, i)
	}
	if f.all > x.o.Attempts || f.asked[i] > x.o.ServerAttempts {
		x.t.Fatalf("seed %d: attempt %d, and %d at server %d: %+v", x.seed, f.all, f.asked[i], i, x.o)
	}
}

// outcome ends the attempt of a flow in one of many ways.
func (x *accounting) outcome(f *accounted) {
	x.t.Helper()
	outcomes := []error{nil, nil, notReachedErr, notReachedErr, eofErr, loginErr, ReplyRefused, ReplyCommandNotSupported,
		ErrEnded, context.Canceled}
	err := outcomes[x.rnd.IntN(len(outcomes))]
	got := x.c.done(&f.a, f.server, err, x.now)
	var fault *ServerError
	switch {
	case err == nil:
		x.want[f.server] = model{trying: x.want[f.server].trying}
	case errors.As(err, &fault):
		x.want[f.server].fault(&x.o, x.now)
	case err == ErrEnded && got.again: // the eighth in a row
		x.want[f.server].fault(&x.o, x.now)
	}
	if got.again {
		x.step(f)
	} else {
		x.over(f)
	}
}

// trial begins the trial of a server if it is due, and ends one that is under way.
func (x *accounting) trial(i int) {
	x.t.Helper()
	all := true
	for i := range x.want {
		all = all && x.want[i].down
	}
	if all != x.c.allDown() {
		x.t.Fatalf("seed %d: all down is %v", x.seed, x.c.allDown())
	}
	m := &x.want[i]
	due := x.c.servers[i].due(x.now, all)
	if right := m.down && !m.trying && (all || x.now-m.since >= x.o.RetryAfter); due != right {
		x.t.Fatalf("seed %d: a trial of server %d is due: %v, want %v", x.seed, i, due, right)
	}
	if due {
		x.c.servers[i].trying, m.trying = true, true
		return
	} else if !m.trying {
		return
	}
	var err error
	if x.rnd.IntN(2) == 0 {
		err = notReachedErr
	}
	x.c.servers[i].tried(&x.c.opts, x.now, err)
	m.trying = false
	if m.down && err == nil {
		*m = model{probation: true}
	} else if m.down {
		m.since = x.now
	}
}

func TestGroupOptions(t *testing.T) {
	for _, o := range []GroupOptions{
		{Attempts: -1}, {ServerAttempts: -1}, {FailThreshold: -1}, {FailWindow: -1}, {RetryAfter: -1}, {Check: -1},
		{ConnectTimeout: -1}, {HandshakeTimeout: -1}, {Select: 9},
	} {
		if err := o.fill(); err == nil {
			t.Errorf("%+v is taken", o)
		}
	}
	if _, err := ParseSelect("random"); err == nil {
		t.Error("random is taken")
	}
}
