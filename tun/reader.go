package tun

import (
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// turn is how many frames are read from one queue while others have frames too. The stack collects as many in a
	// burst.
	turn = 64
	// floodTurns is the number of consecutive full turns with datagrams after which a queue counts as flooded: a
	// whole queue of frames.
	floodTurns = 500/turn + 1
)

// The Go runtime looks for readable descriptors when nothing else runs, and otherwise every 10 ms. A reader that
// always finds a frame would delay answers. After so many frames or bytes it therefore steps back until the runtime
// has looked.
const (
	stepBack      = 128
	stepBackBytes = 1 << 20
)

// reader reads frames from the queues, in turn if several have frames. It also holds the arguments and results of its
// system calls, so that a read allocates nothing; only one goroutine reads at a time. Its closures are made once.
type reader struct {
	q      *queues
	from   []int             // what is read: the queues or a source
	source *source           // nil: the queues are read
	events []unix.EpollEvent // the queues that had frames at the last poll
	at     int               // index of the next of them
	cur    int               // the queue whose turn it is
	left   int               // frames left in its turn; 0: the turn is over
	turns  []turns           // for each queue
	round  uint              // how often all queues were polled

	frames int  // frames read since it last waited or stepped back
	bytes  int  // bytes of those frames
	asleep bool // the read waits, or has waited
	guess  bool // the last two waits were ended by the same queue

	hdr     [HeaderLen]byte
	over    [1]byte // filled only if the frame did not fit
	iov     [3]unix.Iovec
	n       int
	errno   syscall.Errno
	try     func(uintptr)
	tryWait func() bool
}

func (r *reader) init(q *queues) {
	r.q, r.from, r.turns = q, q.fds, make([]turns, len(q.fds))
	r.iov[0].Base = &r.hdr[0]
	r.iov[0].SetLen(HeaderLen)
	r.iov[2].Base = &r.over[0]
	r.iov[2].SetLen(len(r.over))
	r.try = func(uintptr) { r.next() }
	r.tryWait = func() bool {
		switch {
		case r.asleep:
			if r.frames >= stepBack || r.bytes >= stepBackBytes {
				runtime.Gosched() // the runtime continues with the first runnable goroutine, which may have been this one
			}
			r.woken()
		case r.frames >= stepBack || r.bytes >= stepBackBytes:
			r.asleep = true
			r.q.ring()
			return false
		default:
			r.asleep = true
			r.next()
		}
		return r.errno != unix.EAGAIN || r.q.woke.Swap(false)
	}
}

// set makes b the buffer of the next read. nil removes it again, so that the device does not keep it.
func (r *reader) set(b []byte) {
	r.iov[1].Base = unsafe.SliceData(b)
	r.iov[1].SetLen(len(b))
	r.asleep = false
}

// next reads a frame from the queue whose turn it is, or from the next queue that has one.
func (r *reader) next() {
	for {
		if r.left == 0 && !r.pick() {
			return
		}
		if r.read(); r.errno != unix.EAGAIN {
			return
		}
		r.empty()
	}
}

// turns describes the recent turns of one queue.
type turns struct {
	// next is the maximum number of frames in its next turn. It is the number of frames of the last turn, which saves
	// the read that finds nothing more, because all queues are polled before the wait anyway. After a turn that was
	// too short it is doubled.
	next  int
	full  int  // turns of full length since it was last empty
	round uint // the reader's round at the last turn
}

// empty ends the turn of a queue that has no more frames.
func (r *reader) empty() {
	t := &r.turns[r.cur]
	t.next, t.full = max(t.next-r.left, 1), 0
	r.left = 0
}

// used ends a turn that has used all its frames.
func (r *reader) used() {
	t := &r.turns[r.cur]
	if t.next < turn {
		t.next = min(2*t.next, turn)
		return
	}
	if r.source != nil {
		return
	}
	b := unsafe.Slice(r.iov[1].Base, r.iov[1].Len)
	if b = b[:min(len(b), max(r.n-HeaderLen, 0))]; len(b) < 20 || b[0]>>4 == 4 && b[9] != unix.IPPROTO_UDP ||
		b[0]>>4 == 6 && b[6] != unix.IPPROTO_UDP {
		return // TCP sends no more than its windows allow
	}
	if t.full++; t.full >= floodTurns {
		r.q.flooded(r.cur)
	}
}

// woken is next after a wait. Usually the same queue as the last time has a frame, so it is tried without polling.
func (r *reader) woken() {
	r.frames, r.bytes = 0, 0
	last := r.cur
	if r.guess && r.left == 0 && r.at == len(r.events) { // otherwise it had only stepped back, and the turn goes on
		r.begin()
		if r.read(); r.errno != unix.EAGAIN {
			return
		}
		r.empty()
	}
	r.next()
	r.guess = r.errno != unix.EAGAIN && r.cur == last
}

// pick gives the next queue its turn. After all queues with frames have had theirs, it polls again; the kernel lists
// the queues in turn.
func (r *reader) pick() bool {
	if r.at == len(r.events) {
		r.redirect()
		n, errno := r.ask()
		r.round++
		if n == 0 {
			r.round++ // no queue is listed twice in a row
			r.errno = errno
			return false
		}
	}
	r.cur = int(r.events[r.at].Fd)
	r.at++
	r.begin()
	return true
}

func (r *reader) begin() {
	t := &r.turns[r.cur]
	if r.round-t.round > 1 { // it was not listed the last time, so it was empty
		t.full = 0
	}
	t.round, t.next = r.round, max(t.next, 1)
	r.left = t.next
}

// ask polls the queues and returns how many have frames. If none has, errno is not 0.
func (r *reader) ask() (n int, errno syscall.Errno) {
	r.at = 0
	evs, err := r.q.set.Poll()
	if err != nil {
		r.events = nil
		errno, ok := err.(syscall.Errno)
		if !ok {
			errno = unix.EIO
		}
		return 0, errno
	}
	r.events = slices.DeleteFunc(evs, func(e unix.EpollEvent) bool { return e.Fd == noQueue })
	return len(r.events), unix.EAGAIN
}

// read reads one frame from the queue whose turn it is.
func (r *reader) read() {
	for {
		n, _, errno := syscall.RawSyscall(
			unix.SYS_READV,
			uintptr(r.from[r.cur]),
			uintptr(unsafe.Pointer(&r.iov[0])),
			uintptr(len(r.iov)),
		)
		if errno == unix.EINTR {
			continue
		}
		r.n, r.errno = int(n), errno
		if errno == 0 {
			r.frames++
			r.bytes += r.n
			if r.left--; r.left == 0 {
				r.used()
			}
		}
		return
	}
}
