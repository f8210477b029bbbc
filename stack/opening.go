package stack

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// knockTime limits how long a program may take to answer a connection from outside. Its kernel answers at once, unless
// the program does not accept and its backlog is full.
const knockTime = 15 * time.Second

// Open returns a request for a connection to the app that comes from peer, an endpoint beyond the TUN. Its Accept sends
// a SYN from peer to app, an endpoint of the app's kernel; Opened gets the stream when the app has accepted, or an
// error if it refuses or does not answer. Nothing is sent before Accept, and nothing after Reject. The flow's Src is
// app and its Dst is peer, as in a flow that the app began.
func (s *Stack) Open(peer, app netip.AddrPort) flow.StreamRequest {
	return &opening{s: s.shards[s.home(app.Port())], key: tuple{src: app, dst: peer}, start: time.Now()}
}

// opening is a connection that we open toward the app. Like a handshake that the app began, it has no goroutine: gVisor
// reports its result.
type opening struct {
	s     *shard
	key   tuple
	start time.Time
	state atomic.Int32
	st    *stream // from connecting on
	timer *time.Timer
}

// The life of an opening. open and failed are final.
const (
	openingIdle int32 = iota
	openingConnects
	openingOpen
	openingFailed
)

var _ flow.StreamRequest = (*opening)(nil)

// Flow implements flow.StreamRequest.
func (o *opening) Flow() flow.Flow {
	return flow.Flow{Proto: flow.TCP, Src: o.key.src, Dst: o.key.dst, Start: o.start}
}

// OnCancel implements flow.StreamRequest. The app does not wait, so it cannot give up.
func (o *opening) OnCancel(func()) {}

// Reject implements flow.StreamRequest. The app never learns of the connection.
func (o *opening) Reject(flow.Refusal) { o.state.CompareAndSwap(openingIdle, openingFailed) }

// Accept implements flow.StreamRequest.
func (o *opening) Accept(l flow.Listener) {
	if !o.state.CompareAndSwap(openingIdle, openingConnects) {
		return
	}
	s := o.s
	o.st = &stream{s: s, l: l, wq: new(waiter.Queue)}
	o.st.entry.Init(o, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr|waiter.EventRdHUp)
	o.timer = time.AfterFunc(knockTime, o.fail)
	if !s.pending.knock(o) {
		if o.state.CompareAndSwap(openingConnects, openingFailed) {
			o.timer.Stop()
			go l.Opened(nil, ErrAppGone) // not on this goroutine, which may hold locks that Opened takes
		}
		return
	}
	if !o.connect() {
		o.timer.Reset(0)
	}
}

// connect sends the SYN and reports whether that was possible.
func (o *opening) connect() bool {
	id, proto := transportID(o.key)
	ep, err := o.s.engine.Load().ns.NewEndpoint(tcp.ProtocolNumber, proto, o.st.wq)
	if err != nil {
		return false
	}
	o.s.pending.mu.Lock()
	if o.state.Load() != openingConnects { // the stack ends
		o.s.pending.mu.Unlock()
		ep.Close()
		return true
	}
	o.st.ep = ep
	o.st.wq.EventRegister(&o.st.entry)
	o.s.pending.mu.Unlock()
	ep.SocketOptions().SetV6Only(true)
	ep.SocketOptions().SetReuseAddress(true) // a peer may come to two ports of the app from one of its own
	if err := ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: id.LocalAddress, Port: id.LocalPort}); err != nil {
		return false
	}
	err = ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: id.RemoteAddress, Port: id.RemotePort})
	_, started := err.(*tcpip.ErrConnectStarted)
	return started
}

// NotifyEvent is called by gVisor. Locks of the endpoint and of the queue may be held.
func (o *opening) NotifyEvent(m waiter.EventMask) {
	switch o.state.Load() {
	case openingOpen:
		o.st.NotifyEvent(m)
		return
	case openingFailed:
		return
	}
	switch s := tcp.EndpointState(o.st.ep.State()); s {
	case tcp.StateError, tcp.StateClose:
		o.timer.Reset(0)
	case tcp.StateInitial, tcp.StateBound, tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
	default:
		if !o.state.CompareAndSwap(openingConnects, openingOpen) {
			return
		}
		o.timer.Stop()
		o.s.engine.Load().opened(o.s.stats.streams.Add(1))
		o.st.l.Opened(o.st, nil)
		o.st.first()
		o.s.pending.knocked(o)
	}
}

// fail ends an opening that failed or takes too long. It runs on the timer's goroutine, or where the stack ends; the
// caller must not hold locks of gVisor.
func (o *opening) fail() {
	t := o.s.pending
	t.mu.Lock()
	won := o.state.CompareAndSwap(openingConnects, openingFailed)
	ep := o.st.ep
	t.mu.Unlock()
	if !won {
		return
	}
	o.timer.Stop()
	o.st.wq.EventUnregister(&o.st.entry)
	err := error(ErrAppGone)
	if ep != nil {
		if last := ep.LastError(); last != nil {
			err = fmt.Errorf("%w: %v", ErrAppGone, last)
		}
		ep.Abort()
		ep.Close()
	}
	o.s.stats.AcceptFailed.Add(1)
	o.st.l.Opened(nil, err)
	t.knocked(o)
}

// knock records an opening, unless the stack ends.
func (t *pendingTable) knock(o *opening) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.refuse {
		return false
	}
	if t.knocks == nil {
		t.knocks = map[*opening]struct{}{}
	}
	t.knocks[o] = struct{}{}
	t.shaking.Add(1)
	return true
}

// knocked removes an opening whose listener was told the result.
func (t *pendingTable) knocked(o *opening) {
	t.mu.Lock()
	delete(t.knocks, o)
	t.mu.Unlock()
	t.shaking.Done()
}

// failKnocks ends every opening.
func (t *pendingTable) failKnocks() {
	t.mu.Lock()
	all := make([]*opening, 0, len(t.knocks))
	for o := range t.knocks {
		all = append(all, o)
	}
	t.mu.Unlock()
	for _, o := range all {
		o.fail()
	}
}
