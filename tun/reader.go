package tun

import (
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// turn is how many frames are read from one queue while others have some too: as many as the stack collects in a burst.
	turn = 64
	// floodTurns is for how many turns a queue must have been full of datagrams: for as many frames as it holds.
	floodTurns = 500/turn + 1
)

// The Go runtime looks for readable descriptors when nothing else runs, and else every 10 ms. A reader that always finds a frame
// would keep answers waiting: so it steps back after so many frames, or bytes, until the runtime has looked.
const (
	stepBack      = 128
	stepBackBytes = 1 << 20
)

// reader reads frames from the queues, in turn where several have some. It is the arguments and the outcome of its system
// calls too, kept with the device so that a read allocates nothing: one goroutine reads at a time. Its closures are made once.
type reader struct {
	q      *queues
	events []unix.EpollEvent // the queues that had frames when last asked
	at     int               // the next of them
	cur    int               // the queue whose turn it is
	left   int               // frames of its turn; 0: the turn is over
	turns  []turns           // of each queue
	round  uint              // how often all queues were asked

	frames int  // read since it last waited or stepped back
	bytes  int  // of them
	asleep bool // the read waits, or has waited
	guess  bool // the last two waits ended by the same queue

	hdr     [HeaderLen]byte
	over    [1]byte // filled only when the frame did not fit
	iov     [3]unix.Iovec
	n       int
	errno   syscall.Errno
	try     func(uintptr)
	tryWait func() bool
}

func (r *reader) init(q *queues) {
	r.q, r.turns = q, make([]turns, len(q.fds))
	r.iov[0].Base = &r.hdr[0]
	r.iov[0].SetLen(HeaderLen)
	r.iov[2].Base = &r.over[0]
	r.iov[2].SetLen(len(r.over))
	r.try = func(uintptr) { r.next() }
	r.tryWait = func() bool {
		switch {
		case r.asleep:
			if r.frames >= stepBack || r.bytes >= stepBackBytes {
				runtime.Gosched() // the runtime goes on with whom it finds first: that may have been us
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

// set puts b in place; nil takes it out again, so that the device does not keep it.
func (r *reader) set(b []byte) {
	r.iov[1].Base = unsafe.SliceData(b)
	r.iov[1].SetLen(len(b))
	r.asleep = false
}

// next reads a frame from the queue whose turn it is, or from the next one that has some.
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

// turns is what the turns of one queue were like.
type turns struct {
	// next is how many frames its next turn has at most. As many as there were the last time: then the read that finds nothing more
	// is spared, since all queues are asked before the wait anyway. Twice as many after a turn that did not suffice.
	next  int
	full  int  // turns of turn frames since it was last empty
	round uint // the reader's at the last turn
}

// empty ends the turn of a queue that has no more.
func (r *reader) empty() {
	t := &r.turns[r.cur]
	t.next, t.full = max(t.next-r.left, 1), 0
	r.left = 0
}

// used is the end of a turn that used all its frames.
func (r *reader) used() {
	t := &r.turns[r.cur]
	if t.next < turn {
		t.next = min(2*t.next, turn)
		return
	}
	b := unsafe.Slice(r.iov[1].Base, r.iov[1].Len)
	if b = b[:min(len(b), max(r.n-HeaderLen, 0))]; len(b) < 20 || b[0]>>4 == 4 && b[9] != unix.IPPROTO_UDP ||
		b[0]>>4 == 6 && b[6] != unix.IPPROTO_UDP {
		return // TCP sends no more than its windows
	}
	if t.full++; t.full >= floodTurns {
		r.q.flooded(r.cur)
	}
}

// woken is next after a wait. Mostly it is the queue of the last time again, which is tried without asking.
func (r *reader) woken() {
	r.frames, r.bytes = 0, 0
	last := r.cur
	if r.guess && r.left == 0 && r.at == len(r.events) { // else it had only stepped back, and the turn goes on
		r.begin()
		if r.read(); r.errno != unix.EAGAIN {
			return
		}
		r.empty()
	}
	r.next()
	r.guess = r.errno != unix.EAGAIN && r.cur == last
}

// pick gives the next queue its turn. When all that had frames had theirs it asks again; the kernel lists them in turn.
func (r *reader) pick() bool {
	if r.at == len(r.events) {
		n, errno := r.ask()
		r.round++
		if n == 0 {
			r.round++ // none is listed twice in a row
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
	if r.round-t.round > 1 { // it was not listed the last time: it was empty
		t.full = 0
	}
	t.round, t.next = r.round, max(t.next, 1)
	r.left = t.next
}

// ask returns how many queues have frames. errno is never 0 when there are none.
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
			uintptr(r.q.fds[r.cur]),
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
