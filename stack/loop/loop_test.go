package loop

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// running gives a loop that runs until the end of the test, which then finds no descriptor more than before.
func running(t testing.TB) *Loop {
	t.Helper()
	warm, err := NewPoller() // the runtime's poller has descriptors of its own from here on
	if err != nil {
		t.Fatal(err)
	}
	warm.Close()
	before := testkit.CountFiles(t)
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan error, 1)
	go func() { over <- l.Run(context.Background()) }()
	t.Cleanup(func() {
		l.Close()
		l.Close()
		if err := <-over; err != nil {
			t.Error(err)
		}
		if n := testkit.CountFiles(t); n > before {
			t.Errorf("%d descriptors before, %d after", before, n)
		}
	})
	return l
}

func socketPair(t testing.TB) (a, b int) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p[0], p[1]
}

// fake is a task that does as its functions say.
type fake struct {
	Node
	turn func(*fake) bool
	shut func(*fake)
}

func newFake(turn func(*fake) bool) *fake {
	f := &fake{turn: turn}
	f.Init(f)
	return f
}

func (f *fake) Turn() bool { return f.turn(f) }

func (f *fake) Shutdown() {
	if f.shut != nil {
		f.shut(f)
	}
}

// do calls f on the loop, and waits for it.
func do(t testing.TB, l *Loop, f func()) {
	t.Helper()
	done := make(chan struct{})
	if !l.Post(func() { f(); close(done) }) {
		t.Fatal("the loop is closed")
	}
	select {
	case <-done:
	case <-time.After(testkit.Patience):
		t.Fatal("what was posted is not called")
	}
}

func receive[T any](t testing.TB, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(testkit.Patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// TestNotes: bits of any goroutine come, none is lost, and those of one node come together.
func TestNotes(t *testing.T) {
	l := running(t)
	const nodes, rounds = 50, 200
	var seen [nodes]atomic.Uint32
	fakes := make([]*fake, nodes)
	for i := range fakes {
		fakes[i] = newFake(func(f *fake) bool {
			seen[i].Or(f.Got)
			f.Got = 0
			return false
		})
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for r := range rounds {
				for i := range fakes {
					l.Note(&fakes[i].Node, Own<<((g*rounds+r)%20))
				}
			}
		})
	}
	wg.Wait()
	do(t, l, func() {})
	for i := range seen {
		if got := seen[i].Load(); got != (1<<20-1)*Own {
			t.Errorf("node %d got %x", i, got)
		}
	}
}

// TestHandOver: what was readable before the socket changed hands is found by the new owner, without a new event and without
// a second registration; later events are the new owner's.
func TestHandOver(t *testing.T) {
	l := running(t)
	a, b := socketPair(t)
	defer unix.Close(b)
	reads := make(chan ownerRead, 10)
	first, second := newFake(readsAs("first", a, reads)), newFake(readsAs("second", a, reads))
	do(t, l, func() {
		if err := l.Watch(&first.Node, a, Stream); err != nil {
			t.Error(err)
		}
	})
	unix.Write(b, []byte("abcdef"))
	if r := receive(t, reads); r != (ownerRead{"first", "abc"}) {
		t.Fatal(r)
	}
	do(t, l, func() {
		s := l.HandOver(&first.Node, a)
		if s.FD() != a || !s.Watched(l) {
			t.Errorf("%+v", s)
		}
		l.Adopt(&second.Node, s)
		l.Enqueue(&second.Node)
		if n := l.Watched(); n != 1 {
			t.Errorf("%d sockets are watched", n)
		}
	})
	if r := receive(t, reads); r != (ownerRead{"second", "def"}) {
		t.Fatal(r)
	}
	unix.Write(b, []byte("ghi"))
	if r := receive(t, reads); r != (ownerRead{"second", "ghi"}) {
		t.Fatal(r)
	}
	// Released, it is the caller's alone: the set does not know it any more.
	do(t, l, func() {
		s := l.HandOver(&second.Node, a)
		if fd := s.Release(); fd != a {
			t.Errorf("released %d", fd)
		}
		if err := unix.EpollCtl(l.poll.epfd, unix.EPOLL_CTL_DEL, a, nil); err != unix.ENOENT {
			t.Errorf("the loop still watches it: %v", err)
		}
		if n := l.Watched(); n != 0 {
			t.Errorf("%d sockets are watched", n)
		}
	})
	unix.Close(a)
	if s := Unwatched(b); s.Watched(l) || s.FD() != b || s.Release() != b {
		t.Error("an unwatched socket")
	}
	NoSocket.Close()
}

// ownerRead is what one of the owners of a socket has read.
type ownerRead struct{ who, s string }

// readsAs reads a socket, three bytes at a time, and reports them as read by who. The first owner stops after three bytes.
func readsAs(who string, fd int, reads chan<- ownerRead) func(*fake) bool {
	return func(f *fake) bool {
		var buf [3]byte
		for f.Got&In != 0 {
			n, err := unix.Read(fd, buf[:])
			if err != nil {
				f.Got &^= In
				break
			}
			reads <- ownerRead{who, string(buf[:n])}
			if who == "first" {
				break
			}
		}
		return false
	}
}

// TestHupStays: the peer's end, seen by the first owner, is known to the second.
func TestHupStays(t *testing.T) {
	l := running(t)
	a, b := socketPair(t)
	hup := make(chan bool, 1)
	var second *fake
	first := newFake(func(f *fake) bool {
		if f.Got&Hup != 0 {
			l.Adopt(&second.Node, l.HandOver(&f.Node, a))
			l.Enqueue(&second.Node)
		}
		return false
	})
	second = newFake(func(f *fake) bool {
		hup <- f.Got&Hup != 0
		l.Forget(&f.Node)
		unix.Close(a)
		return false
	})
	do(t, l, func() { _ = l.Watch(&first.Node, a, Stream) })
	unix.Close(b)
	if !receive(t, hup) {
		t.Error("the second owner does not know that the peer has ended")
	}
}

// TestSlots: a closed socket's slot serves the next one, and a table for a crowd is given back when the crowd is gone.
func TestSlots(t *testing.T) {
	l := running(t)
	a, b := socketPair(t)
	defer unix.Close(b)
	nodes := make([]*fake, keepSlots+1)
	do(t, l, func() {
		for i := range nodes {
			nodes[i] = newFake(func(*fake) bool { return false })
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
			if err == nil {
				err = l.Watch(&nodes[i].Node, fd, unix.EPOLLIN)
			}
			if err != nil {
				t.Error(err)
				return
			}
			defer func() {
				l.Forget(&nodes[i].Node)
				l.Forget(&nodes[i].Node)
				unix.Close(fd)
			}()
		}
		if n := len(l.slots); n != len(nodes) {
			t.Errorf("%d slots for %d sockets", n, len(nodes))
		}
	})
	do(t, l, func() {
		if len(l.slots) != 0 || cap(l.free) != 0 {
			t.Errorf("room for %d sockets is kept when all have gone", len(l.slots))
		}
		// A stale event, of a generation before, is nobody's.
		n := newFake(func(*fake) bool { t.Error("a stale event"); return false })
		if err := l.Watch(&n.Node, a, unix.EPOLLIN); err != nil {
			t.Error(err)
			return
		}
		l.slots[n.slot].gen++
		unix.Write(b, []byte("x"))
	})
	for range 3 {
		do(t, l, func() {})
	}
	unix.Close(a)
}

// TestTimer: a timer comes in time and once; one that was moved comes then, and one that was stopped does not.
func TestTimer(t *testing.T) {
	l := running(t)
	fired := make(chan string, 10)
	node := func(name string) *fake {
		return newFake(func(f *fake) bool {
			if f.Got&Tick != 0 {
				f.Got &^= Tick
				fired <- name
			}
			return false
		})
	}
	soon, late, moved, stopped := node("soon"), node("late"), node("moved"), node("stopped")
	began := time.Now()
	do(t, l, func() {
		now := l.Now()
		l.SetTimer(&moved.Node, now+time.Hour)
		l.SetTimer(&stopped.Node, now+10*time.Millisecond)
		l.SetTimer(&late.Node, now+60*time.Millisecond)
		l.SetTimer(&soon.Node, now+20*time.Millisecond)
		l.SetTimer(&moved.Node, now+40*time.Millisecond)
		l.StopTimer(&stopped.Node)
		l.StopTimer(&stopped.Node)
	})
	for _, want := range []string{"soon", "moved", "late"} {
		if got := receive(t, fired); got != want {
			t.Errorf("%s fired, want %s", got, want)
		}
	}
	if took := time.Since(began); took < 60*time.Millisecond {
		t.Errorf("all fired within %v", took)
	}
	do(t, l, func() {
		l.SetTimer(&soon.Node, 0) // due long since
		l.SetTimer(&late.Node, l.Now()+time.Hour)
	})
	if got := receive(t, fired); got != "soon" || len(fired) > 0 {
		t.Errorf("%s fired", got)
	}
}

// TestEnd: every member is shut down once, what was posted before is called, and what comes later is told.
func TestEnd(t *testing.T) {
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	shut := 0
	for range 3 {
		f := newFake(func(*fake) bool { return false })
		f.shut = func(*fake) { shut++ }
		if !l.Join(&f.Node) {
			t.Fatal("cannot join")
		}
	}
	left := newFake(func(*fake) bool { return false })
	left.shut = func(*fake) { t.Error("it had left") }
	l.Join(&left.Node)
	l.Leave(&left.Node)
	l.Leave(&left.Node)
	posted := false
	l.Post(func() { posted = true })
	l.Close()
	l.Close()
	if shut != 3 || !posted || !l.Gone() {
		t.Errorf("%d were shut down, posted %v, gone %v", shut, posted, l.Gone())
	}
	if l.Post(func() { t.Error("called") }) || l.Join(&left.Node) {
		t.Error("a closed loop takes work")
	}
	if err := l.Run(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("Run after Close: %v", err)
	}
}

// TestRounds: who always has more to do does not keep others waiting.
func TestRounds(t *testing.T) {
	l := running(t)
	var stop atomic.Bool
	greedy := newFake(func(*fake) bool { return !stop.Load() })
	l.Note(&greedy.Node, Own)
	for range 100 {
		do(t, l, func() {})
	}
	stop.Store(true)
}

func TestCall(t *testing.T) {
	l := running(t)
	got := make(chan uint32, 10)
	n := newFake(func(f *fake) bool { got <- f.Got; f.Got = 0; return false })
	at := &Attached{l, &n.Node, Own << 3}

	c := new(Call)
	c.Attach(at)
	ctx, cancel := context.WithTimeout(c, time.Hour) // as of any context
	defer cancel()
	if c.Err() != nil || ctx.Err() != nil {
		t.Fatal(c.Err(), ctx.Err())
	}
	c.Cancel()
	c.Cancel()
	if g := receive(t, got); g != Own<<3 {
		t.Errorf("got %x", g)
	}
	receive(t, ctx.Done())
	if c.Err() != context.Canceled || ctx.Err() != context.Canceled {
		t.Error(c.Err(), ctx.Err())
	}
	c.Attach(at) // too late: told at once
	if g := receive(t, got); g != Own<<3 {
		t.Errorf("got %x", g)
	}
	receive(t, new(Call).doneAfterCancel())

	c = new(Call)
	c.Attach(at)
	c.Detach(at)
	c.Cancel()
	do(t, l, func() {})
	if len(got) > 0 {
		t.Error("what was detached is told")
	}
}

func (c *Call) doneAfterCancel() <-chan struct{} {
	c.Cancel()
	return c.Done()
}

// TestCallRaces: a cancel beside an attach is never lost.
func TestCallRaces(t *testing.T) {
	l := running(t)
	for range 2000 {
		told := make(chan struct{}, 2)
		n := newFake(func(f *fake) bool { told <- struct{}{}; return false })
		c := new(Call)
		go c.Cancel()
		c.Attach(&Attached{l, &n.Node, Own})
		receive(t, told)
	}
}

// TestAllocations: a note, a timer, an event and a hand-over allocate nothing.
func TestAllocations(t *testing.T) {
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, b := socketPair(t)
	defer unix.Close(a)
	defer unix.Close(b)
	first, second := newFake(
		func(f *fake) bool { f.Got = 0; return false },
	), newFake(
		func(f *fake) bool { f.Got = 0; return false },
	)
	if err := l.Watch(&first.Node, a, Stream); err != nil {
		t.Fatal(err)
	}
	c := new(Call)
	at := &Attached{l, &first.Node, Own}
	msg := []byte("x")
	if n := testing.AllocsPerRun(100, func() {
		c.Attach(at)
		l.Note(&second.Node, Own)
		l.SetTimer(&first.Node, l.Now()+time.Hour)
		unix.Write(b, msg)
		if _, err := l.Step(true); err != nil {
			t.Fatal(err)
		}
		l.StopTimer(&first.Node)
		l.Adopt(&second.Node, l.HandOver(&first.Node, a))
		l.Adopt(&first.Node, l.HandOver(&second.Node, a))
		c.Detach(at)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
