package stack

import (
	"errors"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// ErrAppGone is the error that Listener.Opened gets if the app gave up before its connection was open.
var ErrAppGone = errors.New("the app is gone")

var _ flow.StreamRequest = (*pendingSYN)(nil)

// Flow implements flow.StreamRequest. The flow's ID is zero; route assigns one.
func (e *pendingSYN) Flow() flow.Flow {
	return flow.Flow{Proto: flow.TCP, Src: e.key.src, Dst: e.key.dst, Start: e.start}
}

// OnCancel implements flow.StreamRequest.
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

// Accept implements flow.StreamRequest.
func (e *pendingSYN) Accept(l flow.Listener) {
	t := e.t
	t.mu.Lock()
	switch e.state {
	case synWaiting:
	case synCancelled:
		e.state = synDone
		t.mu.Unlock()
		t.stats.AcceptFailed.Add(1)
		go l.Opened(nil, ErrAppGone) // not on this goroutine, which may hold locks that Opened takes
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
	t.stats.Accepted.Add(1)
	t.open(e, pkt)
}

// take ends the handshake of key and returns its entry, or nil if there is none. Only one caller gets the entry; it
// must tell the listener.
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

// opening reports whether the handshake of key is in progress.
func (t *pendingTable) opening(key tuple) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.byKey[key]
	return e != nil && e.state == synOpening
}

// disturbed records a RST that gVisor received for a handshake. made tells whether there was an endpoint for it.
func (t *pendingTable) disturbed(key tuple, seq uint32, made bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// gVisor requires it to be in the window that begins after the SYN, and the first window is shorter than 64 KiB.
	if e := t.byKey[key]; e != nil && e.state == synOpening && seq-e.isn <= 1<<16 {
		e.made = e.made || made
		t.lookSoon(e, time.Now())
	}
}

// lookSoon makes the timer check a handshake soon.
func (t *pendingTable) lookSoon(e *pendingSYN, now time.Time) {
	e.looks = 0
	if due := now.Add(lookAfter); due.Before(e.due) {
		t.schedule(e, due)
	}
}

// Reject implements flow.StreamRequest.
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
		// Its next SYN is a new attempt, as if this one had exceeded the budget. The same holds if there is too much
		// to remember.
		t.drop(e, synDone)
	} else {
		t.schedule(e, e.over())
	}
	t.mu.Unlock()
	t.stats.Refused.Add(1)
	if why != flow.RefuseSilent && why != flow.RefuseLater {
		t.answer(syn, why)
	}
}
