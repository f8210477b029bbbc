package loop

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// ErrClosed means that the loop is closed, or was closed before the work was done.
var ErrClosed = errors.New("the loop is closed")

// Loop is an event loop: one goroutine, which calls Run.
type Loop struct {
	poll    *Poller
	notes   atomic.Pointer[Node] // newest first
	parked  atomic.Bool          // in poll.Serve without a turn, or about to be: a goroutine that notes must wake it
	closing atomic.Bool
	gone    atomic.Bool // teardown has begun its last pass over the notes
	rang    atomic.Bool // the alarm has rung
	base    time.Time
	poster  poster

	mu      sync.Mutex
	members *Node
	closed  bool // no new members are accepted
	running bool
	posts   []func()

	// The fields below belong to the loop's goroutine.
	run, spare []*Node
	crowded    bool
	waits      bool  // parked was set and must be checked after the wait
	woken      bool  // another goroutine calls Wake or has called it
	failed     error // of the poller
	// served and awaited are the method values serve and await, made once.
	served, awaited func() bool

	slots  []slot
	gen    uint32 // generation of the last slot that was taken
	free   []int32
	timers timers
	alarm  *time.Timer
	armed  time.Duration // when the alarm rings; 0: it is not set
}

// New makes a loop. Tasks may join at once; they get turns when Run runs. The caller calls Run or Close.
func New() (*Loop, error) {
	l := &Loop{base: time.Now()}
	l.served, l.awaited = l.serve, l.await
	l.poster.l = l
	l.poster.Init(&l.poster)
	var err error
	if l.poll, err = NewPoller(); err != nil {
		return nil, err
	}
	return l, nil
}

// Run runs the loop until ctx ends or Close is called, and returns after the teardown, in which every member was shut
// down. It may be called once; a second call returns ErrClosed.
func (l *Loop) Run(ctx context.Context) error {
	l.mu.Lock()
	if l.closed || l.running {
		l.mu.Unlock()
		return ErrClosed
	}
	l.running = true
	l.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer l.teardown()
	for !l.closing.Load() {
		if err := l.serveBy(l.served); err != nil {
			return err
		}
	}
	return nil
}

// Step is one round of Run: it takes events and notes and gives turns. With wait, it waits for an event if there is
// nothing to do. again reports whether a task wants another turn. It is for tests of tasks, on loops that do not run.
func (l *Loop) Step(wait bool) (again bool, err error) {
	l.take()
	if len(l.run) > 0 || !wait {
		l.ask()
		err = l.failed
	} else {
		err = l.serveBy(l.awaited)
	}
	if err != nil {
		return false, err
	}
	l.take()
	l.round()
	return len(l.run) > 0, nil
}

// serveBy lets the poller call f, which is serve or await, until f is done or the loop is woken.
func (l *Loop) serveBy(f func() bool) error {
	woken, err := l.poll.Serve(f)
	l.awake()
	if woken || l.woken {
		l.woken = false
		l.poll.Clear()
		if l.take(); len(l.run) > 0 {
			l.round()
		}
	}
	if err == nil {
		err = l.failed
	}
	if err != nil {
		return fmt.Errorf("cannot wait for events: %w", err)
	}
	return nil
}

// serve gives turns until there is nothing to do, and then returns to the poller to wait. It is called again at the
// next event. done means that the poller must return.
//
// An event that arrives after the poll ends the wait at once, so the sockets are not polled again before the wait.
// They are polled at least before every other round, so that no socket waits long behind notes.
func (l *Loop) serve() (done bool) {
	l.awake()
	for asked := false; ; {
		more := false
		if !asked {
			more = l.ask()
		}
		l.take()
		if l.failed != nil || l.closing.Load() {
			return true
		}
		if len(l.run) == 0 && !more {
			if l.park() {
				return l.woken
			}
			asked = true
			continue
		}
		l.round()
		asked = !asked && !more && len(l.run) == 0
	}
}

// await is serve for Step: it ends when there is something to do.
func (l *Loop) await() (done bool) {
	l.awake()
	l.ask()
	l.take()
	return l.failed != nil || l.closing.Load() || len(l.run) > 0 || !l.park() || l.woken
}

// park declares that the loop waits from now on. It returns false if there is something to do.
func (l *Loop) park() bool {
	l.waits = true
	l.parked.Store(true)
	if l.notes.Load() == nil && !l.closing.Load() && !l.rang.Load() {
		return true
	}
	l.awake()
	return false
}

// awake declares that the loop no longer waits. A goroutine that cleared parked before calls Wake, perhaps only
// later; the next wait then ends at once and without effect.
func (l *Loop) awake() {
	if l.waits {
		l.waits = false
		l.woken = !l.parked.Swap(false) || l.woken
	}
}

// Close ends the loop: Run does the teardown and returns. If Run never ran, Close does the teardown. It does not wait
// for Run, and may be called twice, from any goroutine and from a turn.
func (l *Loop) Close() error {
	l.mu.Lock()
	l.closing.Store(true)
	mine := !l.running
	l.running = true
	l.mu.Unlock()
	if mine {
		l.teardown()
	} else {
		l.poll.Wake()
	}
	return nil
}

// Gone reports whether the loop has ended. What is noted from then on may never be seen.
func (l *Loop) Gone() bool { return l.gone.Load() }

// ask takes the available events. more means that there may be others.
func (l *Loop) ask() (more bool) {
	evs, err := l.poll.Poll()
	if err != nil {
		l.failed = err
		return false
	}
	for i := range evs {
		ev := &evs[i]
		if int(ev.Fd) >= len(l.slots) {
			continue
		}
		s := l.slots[ev.Fd]
		if s.n == nil || s.gen != uint32(ev.Pad) {
			continue
		}
		s.n.Got |= eventBits(ev.Events)
		l.Enqueue(s.n)
	}
	return len(evs) == maxEvents
}

// take takes the timers that are due and the notes.
func (l *Loop) take() {
	l.fire()
	l.takeNotes()
}

// round gives a turn to every node in the queue.
func (l *Loop) round() {
	now := l.run
	l.run = l.spare[:0]
	l.crowded = len(now) > 1
	for i, n := range now {
		now[i] = nil
		n.queued = false
		if n.task.Turn() {
			l.Enqueue(n)
		}
	}
	l.spare = now
	const keep = 4096 // a burst of events must not keep its memory for ever
	if cap(l.spare) > keep && len(l.run) < keep/4 {
		l.spare = nil
	}
}

// Crowded reports whether other nodes have a turn in this round, too.
func (l *Loop) Crowded() bool { return l.crowded }

// Post calls f on the loop's goroutine. f must not block. Post returns false if the loop is closed and f will not be
// called.
func (l *Loop) Post(f func()) bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	l.posts = append(l.posts, f)
	l.mu.Unlock()
	l.Note(&l.poster.Node, Own)
	return true
}

// poster is the task that calls the functions given to Post.
type poster struct {
	Node
	l *Loop
}

// Turn implements Task.
func (p *poster) Turn() (again bool) {
	p.Got = 0
	p.l.mu.Lock()
	fs := p.l.posts
	p.l.posts = nil
	p.l.mu.Unlock()
	for _, f := range fs {
		f()
	}
	return false
}

// Shutdown implements Task. The poster is not a member: teardown calls the functions posted before the end.
func (p *poster) Shutdown() {}

// teardown ends all members. A goroutine that notes something later sees that the loop is gone.
func (l *Loop) teardown() {
	l.closing.Store(true)
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.poster.Turn()
	for {
		l.mu.Lock()
		n := l.members
		l.mu.Unlock()
		if n == nil {
			break
		}
		n.task.Shutdown()
		l.Leave(n)
	}
	l.gone.Store(true)
	l.takeNotes()
	for _, n := range l.run {
		n.task.Turn()
	}
	l.run, l.spare = nil, nil
	if l.alarm != nil {
		l.alarm.Stop()
	}
	_ = l.poll.Close()
}
