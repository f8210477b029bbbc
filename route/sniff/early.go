package sniff

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// ErrAppGone means that the program gave up the connection before its name was known.
var ErrAppGone = errors.New("the app was gone")

// errOver is the error for a listener if the program gave up before Accept.
var errOver = errors.New("the connection was ended")

// The phases of an Early. They belong to the loop.
//
//	reading -> held    the first bytes were examined, and done was called
//	held    -> given   Accept: the listener has the stream
//	reading, held -> over
const (
	reading uint8 = iota
	held
	given
	over
)

// Bits of Node.Got.
const (
	opened   = loop.Own << iota
	readable // the stream may have data or FIN
	hup      // the app may have reset it
	other    // the stream may take data; matters only to the listener
	accepted
	rejected
	aborted
)

// Early is a connection whose SYN was answered before an upstream was asked. It is the StreamRequest for what
// follows. Its methods may be called from any goroutine. It uses no goroutine.
type Early struct {
	loop.Node
	l    *loop.Loop
	req  flow.StreamRequest
	wait time.Duration
	held *atomic.Int64 // bytes held by all connections
	done func(e *Early, name string, err error)

	app     flow.Stream // written by Opened before its hint
	appErr  error
	dropped atomic.Bool // app was closed, or is about to be

	cancel   atomic.Pointer[func()]
	canceled atomic.Bool // cancel was called
	next     atomic.Pointer[flow.Listener]
	told     atomic.Bool // Opened of next was called, or is about to be
	gone     atomic.Bool // the phase is over

	// The fields below belong to the loop's goroutine.
	phase uint8
	open  bool // the handshake with the app is over, so app may be read
	first early
}

var (
	_ flow.StreamRequest = (*Early)(nil)
	_ flow.Listener      = (*Early)(nil)
)

// Start answers the pending SYN of req on l, and looks for a name in what the program sends within wait after the
// handshake. done is called exactly once, never by Start itself: on l, or on its own goroutine if l is closed. It
// receives e and the name, which is empty if none was found; e must then be accepted or rejected. After an error the
// connection is over, and e need not be answered. bytes, if not nil, is kept at the number of bytes that are held.
func Start(l *loop.Loop, req flow.StreamRequest, wait time.Duration, bytes *atomic.Int64,
	done func(e *Early, name string, err error)) *Early {
	if bytes == nil {
		bytes = new(atomic.Int64)
	}
	e := &Early{l: l, req: req, wait: wait, held: bytes, done: done}
	e.Init(e)
	if !l.Join(&e.Node) {
		e.phase = over
		e.gone.Store(true)
		req.Reject(flow.RefuseReset)
		go done(e, "", loop.ErrClosed)
		return e
	}
	req.Accept(e)
	return e
}

// Flow implements flow.StreamRequest.
func (e *Early) Flow() flow.Flow { return e.req.Flow() }

// OnCancel implements flow.StreamRequest.
func (e *Early) OnCancel(f func()) {
	e.cancel.Store(&f)
	if e.gone.Load() && !e.canceled.Swap(true) {
		f()
	}
}

// Accept implements flow.StreamRequest. l receives the stream, including the bytes that were read, on the goroutine
// of e's loop.
func (e *Early) Accept(l flow.Listener) {
	if !e.next.CompareAndSwap(nil, &l) {
		return
	}
	e.l.Note(&e.Node, accepted)
	if e.l.Gone() && !e.told.Swap(true) {
		go l.Opened(nil, errOver)
	}
}

// Reject implements flow.StreamRequest. Because the SYN was answered, the program gets RST, whatever the refusal.
func (e *Early) Reject(flow.Refusal) { e.l.Note(&e.Node, rejected) }

// Abort ends the connection with RST if it has not been accepted: done gets an error, or the function of OnCancel is
// called.
func (e *Early) Abort() { e.l.Note(&e.Node, aborted) }

// Opened implements flow.Listener.
func (e *Early) Opened(s flow.Stream, err error) {
	e.app, e.appErr = s, err
	e.l.Note(&e.Node, opened)
	if e.l.Gone() && s != nil && e.dropped.CompareAndSwap(false, true) {
		go func() { s.Abort(); _ = s.Close() }() // locks of the stack may be held
	}
}

// Ready implements flow.Listener.
func (e *Early) Ready(ev flow.Events) {
	if e.told.Load() {
		if l := e.next.Load(); l != nil {
			(*l).Ready(ev)
			return
		}
	}
	var b uint32
	if ev&flow.Readable != 0 {
		b |= readable
	}
	if ev&flow.Writable != 0 {
		b |= other
	}
	if ev&flow.Hup != 0 {
		b |= hup
	}
	if b != 0 {
		e.l.Note(&e.Node, b)
	}
}

// Turn implements loop.Task.
func (e *Early) Turn() (again bool) {
	got := e.Got
	e.Got = 0
	e.open = e.open || got&opened != 0
	switch {
	case e.phase == given:
		e.forward(got)
	case e.phase == over:
		if got&opened != 0 {
			e.drop()
		}
		if got&accepted != 0 {
			e.tell(nil, errOver)
		}
	case got&(rejected|aborted) != 0:
		e.end(loop.ErrClosed, got&aborted != 0)
	case e.phase == reading:
		if got&opened != 0 && !e.begin() {
			return false
		}
		if !e.open {
			return false
		}
		e.read(got&loop.Tick != 0)
	default:
		if got&hup != 0 && e.isReset() {
			e.end(ErrAppGone, true)
			if got&accepted != 0 {
				e.tell(nil, errOver)
			}
			return false
		}
		if got&accepted != 0 {
			e.give(got)
		}
	}
	return false
}

// begin is the first turn after Opened.
func (e *Early) begin() bool {
	if e.app == nil {
		err := ErrAppGone
		if e.appErr != nil {
			err = fmt.Errorf("%w: %w", ErrAppGone, e.appErr)
		}
		e.end(err, true)
		return false
	}
	e.l.SetTimer(&e.Node, e.l.Now()+e.wait)
	return true
}

// read takes the bytes that are there. late means that the time is over.
func (e *Early) read(late bool) {
	before := len(e.first.b)
	n, err := 0, error(nil)
	for err == nil && !e.first.full() {
		if n, err = e.app.ReadTo(&e.first); n == 0 && err == nil {
			break
		}
	}
	e.held.Add(int64(len(e.first.b) - before))
	switch {
	case err == nil || errors.Is(err, flow.ErrAgain):
	case errors.Is(err, io.EOF):
		e.first.fin = true
	default:
		e.end(ErrAppGone, true)
		return
	}
	name := ""
	if len(e.first.b) >= e.first.need {
		name, e.first.need = Name(e.first.b)
	}
	if need := e.first.need; need != 0 && need <= MaxBytes && !late && !e.first.fin {
		return
	}
	e.l.StopTimer(&e.Node)
	e.phase = held
	done := e.done
	e.done = nil
	done(e, name, nil)
}

// isReset reports whether the app has reset the stream.
func (e *Early) isReset() bool {
	if _, err := e.app.ReadTo(none{}); err != nil && !errors.Is(err, flow.ErrAgain) && !errors.Is(err, io.EOF) {
		return true
	}
	_, err := e.app.WriteFrom(none{})
	return errors.Is(err, flow.ErrReset)
}

// give passes the stream to the listener of Accept, together with all hints.
func (e *Early) give(got uint32) {
	e.phase = given
	e.l.Leave(&e.Node)
	e.first.Stream, e.first.held = e.app, e.held
	e.tell(&e.first, nil)
	e.forward(got)
}

// tell calls Opened of the listener, once.
func (e *Early) tell(s flow.Stream, err error) {
	if l := e.next.Load(); l != nil && !e.told.Swap(true) {
		(*l).Opened(s, err)
	}
}

// forward passes on hints that came while the stream was being passed on.
func (e *Early) forward(got uint32) {
	var ev flow.Events
	if got&readable != 0 {
		ev |= flow.Readable
	}
	if got&other != 0 {
		ev |= flow.Writable
	}
	if got&hup != 0 {
		ev |= flow.Hup
	}
	if l := e.next.Load(); l != nil && ev != 0 {
		(*l).Ready(ev)
	}
}

// Shutdown implements loop.Task.
func (e *Early) Shutdown() { e.end(loop.ErrClosed, true) }

// end resets the connection and tells those who wait for it. With tell, this includes a caller whose done was called.
func (e *Early) end(err error, tell bool) {
	if e.phase >= given {
		return
	}
	e.phase = over
	e.gone.Store(true)
	e.l.StopTimer(&e.Node)
	e.l.Leave(&e.Node)
	e.drop()
	e.first.release(e.held)
	if done := e.done; done != nil {
		e.done = nil
		done(e, "", err)
		return
	}
	if f := e.cancel.Load(); tell && f != nil && e.next.Load() == nil && !e.canceled.Swap(true) {
		(*f)()
	}
}

// drop resets the stream, once.
func (e *Early) drop() {
	if !e.open || e.app == nil || !e.dropped.CompareAndSwap(false, true) {
		return
	}
	e.app.Abort()
	_ = e.app.Close()
}

// early is a stream whose first bytes were read. It keeps the method Queued of the stream, for the relay.
type early struct {
	flow.Stream
	b    []byte
	fin  bool // the app's FIN was read after b
	need int  // result of Name
	held *atomic.Int64
}

func (s *early) full() bool { return len(s.b) >= MaxBytes }

// Write implements io.Writer for Stream.ReadTo while the name is being looked for.
func (s *early) Write(p []byte) (int, error) {
	n := min(len(p), MaxBytes-len(s.b))
	s.b = append(s.b, p[:n]...)
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// ReadTo implements flow.Stream. It first returns the bytes that were read.
func (s *early) ReadTo(w io.Writer) (int, error) {
	if len(s.b) == 0 {
		if s.fin {
			return s.end(w)
		}
		return s.Stream.ReadTo(w)
	}
	n, _ := w.Write(s.b)
	s.held.Add(-int64(n))
	if s.b = s.b[n:]; len(s.b) == 0 {
		s.b = nil
	}
	return n, nil
}

// end is ReadTo after the app's FIN. It reports a reset that came later.
func (s *early) end(w io.Writer) (int, error) {
	n, err := s.Stream.ReadTo(w)
	if err == nil || errors.Is(err, flow.ErrAgain) {
		return n, io.EOF
	}
	return n, err
}

// Close implements flow.Stream.
func (s *early) Close() error {
	s.release(s.held)
	return s.Stream.Close()
}

// release frees the bytes.
func (s *early) release(held *atomic.Int64) {
	held.Add(-int64(len(s.b)))
	s.b = nil
}

// Queued returns how much the app's kernel has not acknowledged, if the stream knows it.
func (s *early) Queued() int {
	if q, ok := s.Stream.(interface{ Queued() int }); ok {
		return q.Queued()
	}
	return 0
}

// none takes nothing and gives nothing. It queries the state of a stream.
type none struct{}

func (none) Write([]byte) (int, error) { return 0, io.ErrShortWrite }
func (none) Read([]byte) (int, error)  { return 0, io.EOF }
func (none) Len() int                  { return 0 }
