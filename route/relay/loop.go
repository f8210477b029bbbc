package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Config of a Loop.
type Config struct {
	// IdleTimeout is how long an upstream connection may be silent before keepalive probes begin. 0: DefaultIdle.
	IdleTimeout time.Duration
	Log         *slog.Logger // nil: slog.Default
}

// DefaultIdle is the least that RFC 1122, 4.2.3.6, allows unless the user wants otherwise.
const DefaultIdle = 2 * time.Hour

// ErrClosed: the loop, or the link, was closed.
var ErrClosed = errors.New("loop closed")

// Loop is an event loop for relays and links: one goroutine, that of Run.
type Loop struct {
	log  *slog.Logger
	idle atomic.Int64 // TCP_KEEPIDLE in seconds, 0: the kernel's own is right

	noGSO atomic.Bool // links send without UDP_SEGMENT: see GSO

	poll    *poller
	notes   atomic.Pointer[node] // newest first
	parked  atomic.Bool          // in poll.wait, or about to be: who notes must wake
	closing atomic.Bool
	gone    atomic.Bool // teardown has begun its last look at the notes

	mu      sync.Mutex
	members *node // all relays and links
	closed  bool  // no new members
	running bool

	// The loop's own.
	run    []*node
	budget int // bytes of a turn toward the app
	spare  []*node
	slots  []slot
	gen    uint32 // of the last slot that was taken
	free   []int32
	w      upWriter
	p      downPayload
	rx     *rxBuffers
}

// slot says who an epoll event is for. The generation guards against an event of a socket that was closed here while a
// process that was just forked still held it.
type slot struct {
	n   *node
	gen uint32
}

// SetIdleTimeout changes Config.IdleTimeout for relays that are started from now on. 0: DefaultIdle.
func (l *Loop) SetIdleTimeout(d time.Duration) { l.idle.Store(int64(keepIdle(d))) }

// NewLoop makes a loop. Relays may be started at once; they move when Run runs.
func NewLoop(c Config) (*Loop, error) {
	if c.IdleTimeout < 0 || c.IdleTimeout > 0 && c.IdleTimeout < time.Second {
		return nil, fmt.Errorf("cannot make a loop: idle timeout %v is less than a second", c.IdleTimeout)
	}
	l := &Loop{log: c.Log}
	l.SetIdleTimeout(c.IdleTimeout)
	if l.log == nil {
		l.log = slog.Default()
	}
	var err error
	if l.poll, err = newPoller(); err != nil {
		return nil, err
	}
	l.w.buf, l.budget = make([]byte, 0, gatherCap), turnBytes
	return l, nil
}

// keepIdle is TCP_KEEPIDLE for d, or 0 if it is what the kernel does anyhow: one system call less for each flow.
func keepIdle(d time.Duration) int {
	if d == 0 {
		d = DefaultIdle
	}
	secs := min(int(d/time.Second), 32767) // MAX_TCP_KEEPIDLE
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_keepalive_time"); err == nil {
		if now, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && now == secs {
			return 0
		}
	}
	return secs
}

// Run runs the loop until ctx ends or Close is called, and returns after the teardown: every relay is reset on both
// sides, every link closed, every done and closed called. Once only.
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
		l.takeNotes()
		if err := l.collect(); err != nil {
			return fmt.Errorf("cannot wait for events: %w", err)
		}
		l.round()
	}
	return nil
}

// Close ends the loop: Run does the teardown and returns. If Run never ran, Close does it. It may be called twice and
// from any goroutine, also from a callback of the loop: it does not wait for Run.
func (l *Loop) Close() error {
	l.mu.Lock()
	l.closing.Store(true)
	mine := !l.running
	l.running = true
	l.mu.Unlock()
	if mine {
		l.teardown()
	} else {
		l.poll.wake()
	}
	return nil
}

// collect takes the events that are there, and waits for some if nothing else is to be done.
func (l *Loop) collect() error {
	var evs []unix.EpollEvent
	var err error
	if len(l.run) > 0 {
		evs, err = l.poll.now()
	} else {
		var woken bool
		l.parked.Store(true)
		if l.notes.Load() == nil && !l.closing.Load() {
			evs, woken, err = l.poll.wait()
		}
		// Who took parked away calls wake, perhaps only now: then the next wait ends at once, for nothing.
		if !l.parked.Swap(false) || woken {
			l.poll.clear()
		}
	}
	if err != nil {
		return err
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
		s.n.got |= eventBits(ev.Events)
		l.enqueue(s.n)
	}
	l.takeNotes()
	return nil
}

func eventBits(ev uint32) (b uint32) {
	if ev&unix.EPOLLIN != 0 {
		b |= sockIn
	}
	if ev&unix.EPOLLOUT != 0 {
		b |= sockOut
	}
	if ev&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		b |= sockIn | sockHup
	}
	if ev&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		b |= sockOut | sockErr
	}
	return b
}

// round gives a turn to everyone who is in the queue now.
func (l *Loop) round() {
	now := l.run
	l.run = l.spare[:0]
	l.budget = turnBytes
	if len(now) > 1 {
		l.budget = crowdBytes
	}
	for i, n := range now {
		now[i] = nil
		n.queued = false
		if n.task.turn() {
			l.enqueue(n)
		}
	}
	l.spare = now
	const keep = 4096 // a burst of events must not hold memory for ever
	if cap(l.spare) > keep && len(l.run) < keep/4 {
		l.spare = nil
	}
}

// watch registers fd for n, edge-triggered. It is unregistered by closing fd, after forget.
func (l *Loop) watch(n *node, fd int, events uint32) error {
	var i int32
	if k := len(l.free); k > 0 {
		i = l.free[k-1]
		l.free = l.free[:k-1]
	} else {
		i = int32(len(l.slots))
		l.slots = append(l.slots, slot{})
	}
	l.gen++
	if err := l.poll.add(fd, events, i, l.gen); err != nil {
		l.free = append(l.free, i)
		return err
	}
	l.slots[i] = slot{n, l.gen}
	n.slot = i
	return nil
}

// keepSlots is the longest table of slots that is kept when none is taken.
const keepSlots = 1000

func (l *Loop) forget(n *node) {
	if n.slot < 0 {
		return
	}
	l.slots[n.slot].n = nil
	l.free = append(l.free, n.slot)
	n.slot = -1
	if len(l.free) == len(l.slots) && len(l.slots) > keepSlots {
		l.slots, l.free = nil, nil
	}
}

// join makes n a member; false: the loop is closed.
func (l *Loop) join(n *node) bool {
	n.slot = -1
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.closing.Load() {
		return false
	}
	n.listed = true
	if n.after = l.members; n.after != nil {
		n.after.before = n
	}
	l.members = n
	return true
}

func (l *Loop) leave(n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !n.listed {
		return
	}
	n.listed = false
	if n.before != nil {
		n.before.after = n.after
	} else {
		l.members = n.after
	}
	if n.after != nil {
		n.after.before = n.before
	}
	n.before, n.after = nil, nil
}

// teardown ends all members. What is noted later finds the loop gone and helps itself (Relay.Opened).
func (l *Loop) teardown() {
	l.closing.Store(true)
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	for {
		l.mu.Lock()
		n := l.members
		l.mu.Unlock()
		if n == nil {
			break
		}
		n.task.shutdown()
		l.leave(n)
	}
	l.gone.Store(true)
	l.takeNotes()
	for _, n := range l.run {
		n.task.turn()
	}
	l.run, l.spare = nil, nil
	_ = l.poll.close()
}
