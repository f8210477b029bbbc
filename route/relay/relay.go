package relay

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Reasons why a relay ended, for errors.Is on Result.Err. See also ErrClosed.
var (
	ErrAppGone       = errors.New("the app was gone")      // before the handshake with it was over
	ErrAppReset      = errors.New("reset by the app")      // RST
	ErrUpstreamReset = errors.New("reset by the upstream") // RST, or the socket failed with an errno
	ErrAborted       = errors.New("aborted")               // Relay.Abort
	// the app's socket is gone, and the far end went on
	ErrOrphan = errors.New("the app closed its socket, and the far end went on")
	ErrLost   = errors.New("data lost") // a bug: the stack did not take what it asked for
)

// Result is the result of a relay.
type Result struct {
	Up, Down uint64 // bytes moved from app to upstream, and back
	Err      error  // nil: both FINs were passed on
}

// Relay is one TCP flow between the app and an upstream socket. It is the flow.Listener of its stream.
type Relay struct {
	loop.Node
	l    *Loop
	done func(Result)

	app     flow.Stream // written by Opened before its hint
	appErr  error
	dropped atomic.Bool // the stream was closed, or is about to be

	up, down atomic.Uint64

	// The fields below belong to the loop's goroutine.
	fd       int32
	watched  bool // fd is
	open     bool // the app's handshake is over, and fd is watched
	over     bool // nothing is left except a late Opened
	upFIN    bool // the app's FIN was read
	upDone   bool // the app's FIN was passed on
	downDone bool // the upstream's FIN was passed on
	spill    []byte
	rst      *rst // not nil: one side has reset
	orphan   *orphan
}

// orphan is a flow whose app has closed its socket while its data is still on the way to the upstream.
type orphan struct {
	moved uint64
	queue int
	since time.Time // of the last progress
}

// rst is the end of a flow by RST. The other side still gets what came before it.
type rst struct {
	byApp bool
	cause error
	dry   bool          // the dead side has no more data
	wait  time.Duration // until the next check

	moved uint64
	queue int
	since time.Time // of the last progress
}

// queuer may be implemented by a Stream. Queued returns how many of the bytes that WriteFrom took have not been
// acknowledged by the app's kernel. With it, a RST of the upstream does not overtake these bytes; without it, Abort
// discards them. It is called only when nothing more will be written.
type queuer interface{ Queued() int }

// lingerLimit is how long the living side may make no progress with the data from before the RST. Without a proxy,
// the app would find all of it in its own kernel's buffer, however late it reads; but a dead flow must not be held
// for ever.
var lingerLimit = time.Minute

// Start answers the pending SYN (req.Accept) and relays between the app and s, a connected non-blocking socket with
// TCP_NODELAY set, until both directions are over or one side resets. It takes ownership of s, even if the app is
// gone. It does not block. A socket that the loop already watches, such as one handed over by a dial on the same
// loop, needs no second registration; Start must then be called on the loop's goroutine, and otherwise may be called
// from any. done, if not nil, is called exactly once, never by Start itself: on the loop, or on its own goroutine if
// the loop is closed.
func (l *Loop) Start(req flow.StreamRequest, s loop.Socket, done func(Result)) *Relay {
	r := &Relay{l: l, done: done}
	r.Init(r)
	if !l.Join(&r.Node) {
		r.over = true
		s.CloseReset()
		req.Reject(flow.RefuseReset)
		if done != nil {
			go done(Result{Err: ErrClosed})
		}
		return r
	}
	if s.Watched(l.Loop) {
		r.fd, r.watched = int32(s.FD()), true
		l.Adopt(&r.Node, s)
	} else {
		r.fd = int32(s.Release())
	}
	setup(int(r.fd), int(l.idle.Load()))
	req.Accept(r)
	return r
}

// Opened implements flow.Listener.
func (r *Relay) Opened(s flow.Stream, err error) {
	r.app, r.appErr = s, err
	r.l.Note(&r.Node, opened)
	if r.l.Gone() && s != nil && r.dropped.CompareAndSwap(false, true) {
		go func() { s.Abort(); _ = s.Close() }() // locks of the stack may be held
	}
}

// Ready implements flow.Listener.
func (r *Relay) Ready(ev flow.Events) {
	var b uint32
	if ev&flow.Readable != 0 {
		b |= appIn
	}
	if ev&flow.Writable != 0 {
		b |= appOut
	}
	if ev&flow.Hup != 0 {
		b |= appIn | appHup
	}
	if b != 0 {
		r.l.Note(&r.Node, b)
	}
}

// Bytes returns the bytes moved so far. It may be called from any goroutine.
func (r *Relay) Bytes() (up, down uint64) { return r.up.Load(), r.down.Load() }

// Abort resets both sides soon. It may be called from any goroutine, more than once, and after the end.
func (r *Relay) Abort() { r.l.Note(&r.Node, ended) }

// Orphaned tells the relay that the app's socket no longer exists. The kernel ends a connection without a socket, so
// the flow ends when the data of the app has been passed to the upstream's socket, or when it has made no progress
// for lingerLimit. Orphaned must be called repeatedly, because each call checks the progress. It may be called from
// any goroutine, and after the end.
func (r *Relay) Orphaned() { r.l.Note(&r.Node, orphaned) }

// Turn implements loop.Task.
func (r *Relay) Turn() (again bool) {
	switch {
	case r.over:
		if r.Got&opened != 0 {
			r.dropApp(true)
		}
		return false
	case r.Got&ended != 0:
		r.finish(ErrAborted)
		return false
	case !r.open && !r.begin():
		return false
	}
	if r.Got&sockErr != 0 {
		r.Got &^= sockErr
		if e := sockError(int(r.fd)); e != 0 {
			r.upstreamReset(e)
		}
	}
	if r.Got&appHup != 0 && !r.over {
		r.Got &^= appHup
		r.probeApp()
	}
	if r.canDown() {
		r.moveDown()
	}
	if r.canUp() {
		r.moveUp()
	}
	if r.over {
		return false
	}
	if r.rst != nil {
		return r.resetTurn()
	}
	if r.upDone && r.downDone {
		r.finish(nil)
		return false
	}
	if r.Got&orphaned != 0 {
		r.Got &^= orphaned
		if r.orphanTurn(); r.over {
			return false
		}
	}
	return r.canDown() || r.canUp()
}

// orphanTurn ends a flow without an app when nothing is left to do for it. After the app's FIN was passed on, the
// kernel has all data of the app. It treats the upstream's socket as it would have treated the app's: it continues to
// send for a while, and waits for the far end's FIN for tcp_fin_timeout.
func (r *Relay) orphanTurn() {
	if r.upDone {
		r.end(ErrOrphan, true)
		return
	}
	now, moved, queue := time.Now(), r.up.Load(), unacked(int(r.fd))
	if o := r.orphan; o == nil || o.moved != moved || o.queue != queue {
		r.orphan = &orphan{moved, queue, now}
	} else if now.Sub(o.since) >= lingerLimit {
		r.finish(ErrOrphan)
	}
}

// begin is the first turn after Opened.
func (r *Relay) begin() bool {
	if r.Got&opened == 0 {
		return false
	}
	if r.app == nil {
		err := ErrAppGone
		if r.appErr != nil {
			err = fmt.Errorf("%w: %w", ErrAppGone, r.appErr)
		}
		r.finish(err)
		return false
	}
	if !r.watched {
		if err := r.l.Watch(&r.Node, int(r.fd), loop.Stream); err != nil {
			r.finish(fmt.Errorf("%w: cannot watch its socket: %w", ErrAborted, err))
			return false
		}
	}
	// The socket's events are reported by epoll. Everything else is tried now: early data is sent in this turn.
	r.open = true
	r.Got |= sockOut | appIn | appOut
	return true
}

// appReset handles the app's RST. Data that it sent before is passed on first.
func (r *Relay) appReset(cause error) {
	if r.rst != nil {
		r.finishReset() // both sides are dead
		return
	}
	if errors.Is(cause, flow.ErrReset) {
		cause = ErrAppReset
	} else {
		cause = fmt.Errorf("%w: %w", ErrAppReset, cause)
	}
	// After its FIN, the app has no more data, and nothing would read from it again.
	r.beginReset(&rst{byApp: true, cause: cause, dry: r.upFIN})
	r.Got |= appIn
}

// upstreamReset handles a dead socket. What it has received can still be read.
func (r *Relay) upstreamReset(e unix.Errno) {
	if r.rst != nil {
		if r.rst.byApp {
			r.finishReset()
		}
		return
	}
	cause := ErrUpstreamReset
	if e != unix.ECONNRESET && e != unix.EPIPE { // ETIMEDOUT of keepalive, EHOSTUNREACH
		cause = fmt.Errorf("%w: %w", ErrUpstreamReset, e)
	}
	r.beginReset(&rst{cause: cause, dry: r.downDone})
	r.spill = nil
	r.Got |= sockIn | sockHup
}

func (r *Relay) beginReset(x *rst) {
	x.since = time.Now()
	x.queue = -1
	r.rst = x
}

// resetTurn ends the flow when the data from before the RST was passed on, or has made no progress for lingerLimit.
func (r *Relay) resetTurn() (again bool) {
	x := r.rst
	queue := 0
	if x.byApp {
		queue = unacked(int(r.fd))
	} else if q, ok := r.app.(queuer); ok && x.dry {
		queue = q.Queued()
	}
	if x.dry && queue == 0 && len(r.spill) == 0 {
		r.finishReset()
		return false
	}
	now := time.Now()
	if moved := r.up.Load() + r.down.Load(); moved != x.moved || queue != x.queue {
		x.moved, x.queue, x.since = moved, queue, now
	} else if now.Sub(x.since) >= lingerLimit {
		r.finishReset()
		return false
	}
	// There is no event for an empty queue, so check again at growing intervals.
	if x.wait == 0 || r.Got&ticked != 0 {
		x.wait = min(max(2*x.wait, time.Millisecond), 128*time.Millisecond)
		r.l.SetTimer(&r.Node, r.l.Now()+x.wait)
	}
	r.Got &^= ticked
	return r.canDown() || r.canUp()
}

func (r *Relay) finishReset() { r.finish(r.rst.cause) }

// Shutdown implements loop.Task.
func (r *Relay) Shutdown() { r.finish(ErrClosed) }

// finish closes both sides, in order or with RST, and calls done.
func (r *Relay) finish(err error) { r.end(err, err == nil) }

// end is finish for callers that know how the upstream's socket must be closed.
func (r *Relay) end(err error, inOrder bool) {
	if r.over {
		return
	}
	r.over = true
	r.l.Forget(&r.Node)
	if inOrder {
		_ = loop.Close(int(r.fd))
	} else {
		loop.CloseReset(int(r.fd))
	}
	r.fd = -1
	r.l.StopTimer(&r.Node)
	r.spill, r.rst, r.orphan = nil, nil, nil
	if r.Got&opened != 0 {
		r.dropApp(err != nil)
	}
	r.l.Leave(&r.Node)
	if done := r.done; done != nil {
		r.done = nil
		done(Result{Up: r.up.Load(), Down: r.down.Load(), Err: err})
	}
}

// dropApp releases the stream, once.
func (r *Relay) dropApp(abort bool) {
	if r.app == nil || !r.dropped.CompareAndSwap(false, true) {
		return
	}
	if abort {
		r.app.Abort()
	}
	_ = r.app.Close()
	r.app = nil
}
