package stack

import (
	"errors"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// ErrAppGone is what Listener.Opened is given when the app gave up before its connection was open.
var ErrAppGone = errors.New("the app is gone")

var _ flow.StreamRequest = (*pendingSYN)(nil)

// Flow names the connection. Its ID is zero: route gives it one.
func (e *pendingSYN) Flow() flow.Flow {
	return flow.Flow{Proto: flow.TCP, Src: e.key.src, Dst: e.key.dst, Start: e.start}
}

// OnCancel is that of flow.StreamRequest.
func (e *pendingSYN) OnCancel(f func()) {
	e.t.mu.Lock()
	switch e.state {
	case synWaiting:
		e.onCancel = f
		f = nil
	case synCancelled:
	default:
		f = nil
	}
	e.t.mu.Unlock()
	if f != nil {
		f()
	}
}

// Accept is that of flow.StreamRequest.
func (e *pendingSYN) Accept(l flow.Listener) {
	t := e.t
	t.mu.Lock()
	switch e.state {
	case synWaiting:
	case synCancelled:
		e.state = synDone
		t.mu.Unlock()
		t.stats.acceptFailed.Add(1)
		go l.Opened(nil, ErrAppGone) // not on this goroutine, which may hold what Opened wants
		return
	default:
		t.mu.Unlock()
		return
	}
	pkt := e.pkt
	e.pkt = nil
	t.leave(e)
	t.shaking.Add(1)
	e.state, e.listener, e.onCancel = synOpening, l, nil
	t.shakes++
	e.openBy = time.Now().Add(openTime)
	t.schedule(e, e.openBy)
	t.mu.Unlock()
	t.stats.accepted.Add(1)
	t.open(e, pkt)
}

// take ends the handshake of key and returns its entry, once: who gets it tells the listener. nil: none is under way.
func (t *pendingTable) take(key tuple) *pendingSYN {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.byKey[key]
	if e == nil || e.state != synOpening {
		return nil
	}
	t.drop(e, synDone)
	return e
}

// opening reports whether the handshake of key is under way.
func (t *pendingTable) opening(key tuple) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.byKey[key]
	return e != nil && e.state == synOpening
}

// disturbed takes note of a RST that gVisor was given for a handshake. made: there was an endpoint for it.
func (t *pendingTable) disturbed(key tuple, seq uint32, made bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// gVisor wants it in the window that begins after the SYN, and the first window is shorter than 64 KiB.
	if e := t.byKey[key]; e != nil && e.state == synOpening && seq-e.isn <= 1<<16 {
		e.made = e.made || made
		t.lookSoon(e, time.Now())
	}
}

// lookSoon has the timer look at a handshake.
func (t *pendingTable) lookSoon(e *pendingSYN, now time.Time) {
	e.looks = 0
	if due := now.Add(lookAfter); due.Before(e.due) {
		t.schedule(e, due)
	}
}

// Reject is that of flow.StreamRequest.
func (e *pendingSYN) Reject(why flow.Refusal) {
	t := e.t
	t.mu.Lock()
	if e.state != synWaiting {
		t.mu.Unlock()
		return
	}
	syn := synHeaders(e.pkt)
	t.leave(e)
	e.state, e.why, e.onCancel = synRefused, why, nil
	if why == flow.RefuseSilent {
		e.state = synSilent
	}
	if why == flow.RefuseLater || len(t.byKey) > 4*t.limits.Pending {
		// Its next SYN is a new try, as if this one had been over the budget. So it is when there is too much to remember.
		t.drop(e, synDone)
	} else {
		t.schedule(e, e.over())
	}
	t.mu.Unlock()
	t.stats.refused.Add(1)
	if why != flow.RefuseSilent && why != flow.RefuseLater {
		t.answer(syn, why)
	}
}
