package relay

import "sync/atomic"

// Hints: what may be possible, and what happened. The first four stay set in node.got until an attempt fails.
const (
	sockIn   uint32 = 1 << iota // the socket may have data, FIN or an error
	sockOut                     // the socket may take data
	appIn                       // the app's stream may have data or FIN
	appOut                      // the app's stream may take data
	sockHup                     // the upstream's FIN or RST is in: recv until it says so
	sockErr                     // EPOLLERR or EPOLLHUP: ask SO_ERROR
	appHup                      // the app may have reset: ask the stream
	opened                      // Listener.Opened came
	ended                       // the owner wants it to end
	ticked                      // the linger timer
	orphaned                    // the app's socket is gone
)

// node is what the loop knows of a relay or a link.
type node struct {
	task task

	// Written by any goroutine. A node with hints is on the loop's note list, and next belongs to that list until the
	// loop takes the hints.
	hints atomic.Uint32
	next  *node

	// The loop's own.
	got    uint32 // hints taken over
	queued bool   // in the run queue
	slot   int32  // index of Loop.slots, -1 when not watched

	// The list of everything that the loop must end, under Loop.mu.
	before, after *node
	listed        bool
}

// task is a relay or a link. Both methods are called on the loop.
type task interface {
	turn() (again bool) // again: there is more to do, after the others had their turn
	shutdown()          // the loop ends
}

// note hands hints over to the loop. It does not block and takes no lock: callers may hold any.
func (l *Loop) note(n *node, bits uint32) {
	if n.hints.Or(bits) != 0 {
		return // on the list already; who put it there wakes the loop
	}
	for {
		head := l.notes.Load()
		n.next = head
		if l.notes.CompareAndSwap(head, n) {
			break
		}
	}
	if l.parked.Load() && l.parked.CompareAndSwap(true, false) {
		l.poll.wake()
	}
}

// takeNotes moves everything noted to the run queue, oldest first.
func (l *Loop) takeNotes() {
	if l.notes.Load() == nil {
		return
	}
	var first *node
	for n := l.notes.Swap(nil); n != nil; {
		next := n.next
		n.next = first
		first, n = n, next
	}
	for n := first; n != nil; {
		next := n.next
		n.next = nil // before the hints are taken: from then on it may be listed again
		n.got |= n.hints.Swap(0)
		l.enqueue(n)
		n = next
	}
}

func (l *Loop) enqueue(n *node) {
	if n.queued {
		return
	}
	n.queued = true
	l.run = append(l.run, n)
}
