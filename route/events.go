package route

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// EventKind is what happened to a flow.
type EventKind uint8

// The events of a flow occur in this order; a flow that fails skips some. A flow that a rule refuses has only the
// last.
const (
	FlowOpened      EventKind = iota // an upstream was asked for it; UDP: the mapping was made
	FlowDialled                      // TCP: the upstream granted it
	FlowEstablished                  // TCP: the program's handshake is complete; UDP: the association was made, or made again
	FlowClosed                       // it is over, and its State tells how
)

var eventNames = [...]string{
	FlowOpened: "opened", FlowDialled: "dialled", FlowEstablished: "established", FlowClosed: "closed",
}

func (k EventKind) String() string { return eventNames[k] }

// Event is an event of a flow, for a Watcher.
type Event struct {
	Kind EventKind
	At   time.Time
	Flow FlowInfo
	Err  error // FlowClosed: why, if it did not end in order
}

// Watcher receives the events of all flows from Watch on. The caller must close it.
type Watcher struct {
	r      *Router
	events chan Event
	lost   atomic.Uint64
}

// watchers receive events. If there are none, an event costs one atomic load.
type watchers struct {
	all atomic.Pointer[[]*Watcher] // nil: none
	mu  sync.Mutex                 // guards changes of all
}

// Watch begins to watch. queue is how many events may wait to be received; further ones are dropped and counted.
func (r *Router) Watch(queue int) *Watcher {
	w := &Watcher{r: r, events: make(chan Event, queue)}
	r.watched.change(func(all []*Watcher) []*Watcher { return append(all, w) })
	return w
}

// Close ends the watching. It may be called twice.
func (w *Watcher) Close() {
	w.r.watched.change(func(all []*Watcher) []*Watcher {
		return slices.DeleteFunc(all, func(x *Watcher) bool { return x == w })
	})
}

// Events returns the channel of events, which is never closed.
func (w *Watcher) Events() <-chan Event { return w.events }

// Lost returns how many events were dropped since the previous call.
func (w *Watcher) Lost() uint64 { return w.lost.Swap(0) }

// Over returns a channel that is closed when the Router has ended; no more events follow.
func (w *Watcher) Over() <-chan struct{} { return w.r.over }

// change replaces the list, which the senders of events read without a lock.
func (w *watchers) change(f func([]*Watcher) []*Watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []*Watcher
	if old := w.all.Load(); old != nil {
		all = slices.Clone(*old)
	}
	if all = f(all); len(all) == 0 {
		w.all.Store(nil)
		return
	}
	w.all.Store(&all)
}

// any reports whether there are watchers.
func (w *watchers) any() bool { return w.all.Load() != nil }

// send sends an event to all watchers. It does not block, so locks may be held.
func (w *watchers) send(kind EventKind, f FlowInfo, err error) {
	all := w.all.Load()
	if all == nil {
		return
	}
	e := Event{Kind: kind, At: time.Now(), Flow: f, Err: err}
	for _, one := range *all {
		select {
		case one.events <- e:
		default:
			one.lost.Add(1)
		}
	}
}

// event sends an event to the watchers, if there are any.
func (s *stream) event(kind EventKind) {
	if s.r.watched.any() {
		s.r.watched.send(kind, s.info(), nil)
	}
}

// event sends an event to the watchers, if there are any. The caller holds udp.mu.
func (m *mapping) event(kind EventKind) {
	if m.s.watched.any() {
		m.s.watched.send(kind, m.info(), nil)
	}
}

// request returns the request for the relay to answer. If there are watchers, the end of the handshake with the
// program is an event.
func (s *stream) request() flow.StreamRequest {
	if !s.r.watched.any() {
		return s.req
	}
	return &watchedRequest{s.req, s}
}

type watchedRequest struct {
	flow.StreamRequest
	s *stream
}

func (q *watchedRequest) Accept(l flow.Listener) {
	q.StreamRequest.Accept(&watchedListener{l, q.s})
}

type watchedListener struct {
	flow.Listener
	s *stream
}

func (l *watchedListener) Opened(app flow.Stream, err error) {
	if err == nil {
		l.s.event(FlowEstablished)
	}
	l.Listener.Opened(app, err)
}
