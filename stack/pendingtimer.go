package stack

import (
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// fire is the timer's function. It handles the entries that are due. Only one call runs at a time.
func (t *pendingTable) fire() {
	t.mu.Lock()
	if t.firing || t.closed {
		t.mu.Unlock()
		return
	}
	t.firing = true
	for !t.closed && len(t.heap) != 0 {
		e := t.heap[0]
		now := time.Now()
		if e.due.After(now) {
			break
		}
		t.look(e, now) // releases the lock
	}
	t.firing = false
	t.arm()
	t.idle.Broadcast()
	t.mu.Unlock()
}

// look handles e, which is due. It may release the lock for a while.
func (t *pendingTable) look(e *pendingSYN, now time.Time) {
	switch e.state {
	case synRefused, synSilent:
		t.drop(e, synDone)
	case synOpening:
		t.lookHandshake(e, now)
	case synWaiting:
		if t.sockets == nil {
			t.gaveUp(e)
			return
		}
		t.schedule(e, now.Add(askEvery)) // during the query and after it
		last := e.last
		t.mu.Unlock()
		there, err := t.sockets.Exists(flow.TCP, e.key.src, e.key.dst)
		t.mu.Lock()
		switch {
		case e.state != synWaiting || !e.last.Equal(last): // its state changed meanwhile
		case err == nil && there:
		case err != nil && now.Before(e.over()): // the query failed: only the silence can tell
			t.schedule(e, e.over())
		default:
			t.gaveUp(e)
		}
	}
}

// lookHandshake ends a handshake that has failed or takes too long.
func (t *pendingTable) lookHandshake(e *pendingSYN, now time.Time) {
	if now.Before(e.openBy) {
		t.mu.Unlock()
		s := t.shake(e.key)
		t.mu.Lock()
		switch {
		case e.state != synOpening: // its state changed meanwhile
			return
		case s == shakeFailed, s == shakeNone && (e.made || e.looks == lookTimes):
		case s == shakeDone || e.looks == lookTimes: // the RST was not a valid one
			t.schedule(e, e.openBy)
			return
		default:
			e.looks++
			t.schedule(e, now.Add(lookAfter<<e.looks))
			return
		}
	}
	t.schedule(e, now.Add(openTime))
	t.mu.Unlock()
	t.abort(e.key)
	t.mu.Lock()
}

// failAll ends every handshake, whoever began it.
func (t *pendingTable) failAll() {
	t.failKnocks()
	t.mu.Lock()
	var keys []tuple
	for _, e := range t.byKey {
		if e.state == synOpening {
			keys = append(keys, e.key)
		}
	}
	t.mu.Unlock()
	for _, k := range keys {
		t.abort(k)
	}
}

// gaveUp cancels e. It releases the lock for the call of its function.
func (t *pendingTable) gaveUp(e *pendingSYN) {
	t.stats.Cancelled.Add(1)
	cancel := t.cancel(e)
	t.mu.Unlock()
	cancel()
	t.mu.Lock()
}

// refuseAll answers with RST every waiting SYN and, from now on, every new one.
func (t *pendingTable) refuseAll() {
	t.mu.Lock()
	t.refuse = true
	var cancels []func()
	var syns [][]byte
	for _, e := range t.byKey {
		if e.state == synWaiting {
			syns = append(syns, synHeaders(e.pkt))
			cancels = append(cancels, t.cancel(e))
		}
	}
	t.mu.Unlock()
	for i := range syns {
		t.answer(syns[i], flow.RefuseReset)
		cancels[i]()
	}
}

// close cancels the waiting entries and waits for the timer. The stack ends the handshakes that are in progress.
func (t *pendingTable) close() {
	t.mu.Lock()
	t.closed = true
	t.timer.Stop()
	var cancels []func()
	for _, e := range t.byKey {
		switch e.state {
		case synWaiting:
			cancels = append(cancels, t.cancel(e))
		case synRefused, synSilent:
			t.drop(e, synDone)
		}
	}
	for t.firing {
		t.idle.Wait()
	}
	t.mu.Unlock()
	for _, f := range cancels {
		f()
	}
}
