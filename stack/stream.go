package stack

import (
	"errors"
	"io"
	"sort"
	"sync/atomic"

	"github.com/viasocks/viasocks/stack/flow"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

var (
	errWriteClosed = errors.New("cannot write to the app: its FIN is already sent")
	errPayload     = errors.New("cannot write to the app: the payload was shorter than it promised")
)

// stream is the app's end of an open connection: a gVisor endpoint, and what gVisor forgets. It has no goroutine and
// no buffer of its own.
//
// Only reset decides whether the app has reset the connection, and remembers it: gVisor returns its hard error once,
// reports a RST after a FIN like EOF, and also fires HUp on entering TIME_WAIT.
type stream struct {
	s     *shard
	l     flow.Listener
	ep    tcpip.Endpoint
	wq    *waiter.Queue
	entry waiter.Entry

	wasReset atomic.Bool // never cleared
	aborted  atomic.Bool // we aborted it
	closed   atomic.Bool
	sentFIN  atomic.Bool
	readEOF  atomic.Bool
	asks     atomic.Bool // keepalive is set

	rd    turnWriter   // used by the goroutine that reads and writes
	wr    checkPayload // used by the same goroutine
	fixed bool         // used by the same goroutine; the send buffer is no longer tuned
}

var _ flow.Stream = (*stream)(nil)

// watch subscribes to the endpoint's events. Locks of gVisor are held.
func (st *stream) watch() {
	st.s.engine.Load().opened(st.s.stats.streams.Add(1))
	st.entry.Init(st, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr|waiter.EventRdHUp)
	st.wq.EventRegister(&st.entry)
}

// keepalive sets the keepalive timer, which is not possible where the stream is made.
func (st *stream) keepalive() {
	if st.asks.Swap(true) {
		return
	}
	idle := tcpip.KeepaliveIdleOption(st.s.keepalive.Load())
	_ = st.ep.SetSockOpt(&idle)
	st.ep.SocketOptions().SetKeepAlive(true)
}

// first tells the listener, after Opened, what happened before the events were subscribed to.
func (st *stream) first() {
	if !st.closed.Load() && st.ep.Readiness(waiter.ReadableEvents) != 0 {
		st.l.Ready(flow.Readable)
	}
}

// NotifyEvent is called by gVisor. Locks of the endpoint and of the queue may be held.
func (st *stream) NotifyEvent(m waiter.EventMask) {
	var ev flow.Events
	if m&(waiter.ReadableEvents|waiter.EventRdHUp) != 0 {
		ev |= flow.Readable
	}
	if m&waiter.WritableEvents != 0 {
		ev |= flow.Writable
	}
	if m&(waiter.EventHUp|waiter.EventErr) != 0 {
		ev |= flow.Hup
	}
	if ev != 0 {
		st.l.Ready(ev)
	}
}

// ReadTo implements flow.Stream. It does not return an error of w, which w must remember; such an error ends the turn
// like a short write. Data that came before a reset is still passed on.
func (st *stream) ReadTo(w io.Writer) (int, error) {
	if st.aborted.Load() || st.closed.Load() {
		return 0, flow.ErrReset
	}
	if !st.asks.Load() {
		st.keepalive()
	}
	st.rd.w = w
	res, err := st.ep.Read(&st.rd, tcpip.ReadOptions{})
	st.rd.w = nil
	switch err.(type) {
	case nil:
		if res.Count > 0 {
			// gVisor grows the window only if it is told what was read.
			st.ep.ModerateRecvBuf(res.Count)
		}
		return res.Count, nil
	case *tcpip.ErrBadBuffer: // w took nothing
		return 0, nil
	case *tcpip.ErrWouldBlock:
		if st.wasReset.Load() {
			return 0, flow.ErrReset
		}
		return 0, flow.ErrAgain
	case *tcpip.ErrClosedForReceive:
		if st.reset() {
			return 0, flow.ErrReset
		}
		st.readEOF.Store(true)
		return 0, io.EOF
	}
	st.latch()
	return 0, flow.ErrReset
}

// WriteFrom implements flow.Stream.
func (st *stream) WriteFrom(p flow.Payload) (int, error) {
	if st.wasReset.Load() || st.aborted.Load() || st.closed.Load() {
		return 0, flow.ErrReset
	}
	if !st.asks.Load() {
		st.keepalive()
	}
	st.wr.p, st.wr.err = p, nil
	n, err := st.ep.Write(&st.wr, tcpip.WriteOptions{})
	st.wr.p = nil
	switch err.(type) {
	case nil:
		return int(n), nil
	case *tcpip.ErrWouldBlock:
		return 0, flow.ErrAgain
	case *tcpip.ErrBadBuffer:
		return 0, st.wr.err
	case *tcpip.ErrClosedForSend:
		if !st.reset() && st.sentFIN.Load() {
			return 0, errWriteClosed
		}
	}
	st.latch()
	return 0, flow.ErrReset
}

// CloseWrite implements flow.Stream. A second call has no effect.
func (st *stream) CloseWrite() error {
	if st.wasReset.Load() || st.aborted.Load() || st.closed.Load() {
		return flow.ErrReset
	}
	if st.sentFIN.Swap(true) {
		return nil
	}
	if err := st.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
		// The connection has ended, and not by two FINs.
		st.sentFIN.Store(false)
		st.latch()
		return flow.ErrReset
	}
	return nil
}

// Abort implements flow.Stream. It must not be called from Ready.
func (st *stream) Abort() {
	if st.closed.Load() || st.aborted.Swap(true) {
		return
	}
	if !st.reset() {
		st.s.stats.Aborted.Add(1)
	}
	st.ep.Abort()
}

// Close implements flow.Stream. After both FINs, gVisor continues to send what is still queued, limited by the send
// buffer, until the app's kernel has acknowledged it or is gone. Close must not be called from Ready.
func (st *stream) Close() error {
	if st.sentFIN.Load() && st.readEOF.Load() {
		if st.closed.Swap(true) {
			return nil
		}
	} else {
		st.Abort()
		if st.closed.Swap(true) {
			return nil
		}
	}
	st.wq.EventUnregister(&st.entry)
	st.ep.Close()
	st.s.stats.streams.Add(-1)
	return nil
}

// Queued returns how many written bytes the app's kernel has not acknowledged yet, so that a RST from the upstream need
// not overtake them: Abort discards what is queued. It may be called only when nothing more will be written, by the
// goroutine that wrote. After CloseWrite it distinguishes only 0 from more than 0.
//
// gVisor has no function for this. But it tells whether the buffer has room, whatever the size of the buffer.
func (st *stream) Queued() int {
	if st.aborted.Load() || st.closed.Load() || st.reset() {
		return 0
	}
	switch tcp.EndpointState(st.ep.State()) {
	case tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
		return 1
	}
	o := st.ep.SocketOptions()
	size := o.GetSendBufferSize()
	defer o.SetSendBufferSize(size, false)
	if !st.fixed {
		// From here on gVisor does not change the size, except for one change that may be in progress.
		st.fixed = true
		o.SetSendBufferSize(size, true)
	}
	search := func() int {
		return sort.Search(2*maxSendBuffer, func(n int) bool {
			o.SetSendBufferSize(int64(n)+1, false)
			return st.ep.Readiness(waiter.WritableEvents) != 0
		})
	}
	return max(search(), search())
}

// reset reports, and remembers, that the connection ended otherwise than by two FINs. gVisor's states are ERROR after
// a RST or a timeout, and CLOSED after LAST_ACK and TIME_WAIT, but also after a RST in CLOSE_WAIT when our FIN was
// not yet requested.
func (st *stream) reset() bool {
	if st.wasReset.Load() {
		return true
	}
	switch tcp.EndpointState(st.ep.State()) {
	case tcp.StateError:
	case tcp.StateClose:
		if st.sentFIN.Load() {
			return false
		}
	default:
		return false
	}
	st.latch()
	return true
}

func (st *stream) latch() {
	if !st.wasReset.Swap(true) && !st.aborted.Load() {
		st.s.stats.AppResets.Add(1)
	}
}

// turnWriter makes a short write end the turn: gVisor panics at a short write without an error.
type turnWriter struct{ w io.Writer }

func (t *turnWriter) Write(b []byte) (int, error) {
	n, err := t.w.Write(b)
	n = min(max(n, 0), len(b))
	if n < len(b) && err == nil {
		err = io.ErrShortWrite
	}
	return n, err
}

// checkPayload sits between a payload and gVisor. gVisor first reads zero bytes to find out whether there is an end,
// and asks without end if it gets less than promised.
type checkPayload struct {
	p   flow.Payload
	err error
}

func (c *checkPayload) Len() int { return max(c.p.Len(), 0) }

func (c *checkPayload) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := c.p.Read(b)
	if n == len(b) {
		return n, nil
	}
	if n > 0 && n < len(b) && err == nil {
		return n, nil // the rest is requested next
	}
	if err == nil || err == io.EOF {
		err = errPayload
	}
	c.err = err
	return min(max(n, 0), len(b)), err
}
