package loop

import (
	"sync/atomic"
	"time"
)

// Bits of Node.Got. A task's own bits begin at Own; they are set by Loop.Note.
const (
	In   uint32 = 1 << iota // the socket may have data, FIN or an error
	Out                     // the socket may take data
	Hup                     // the peer's FIN or RST is in: read until it says so
	Err                     // EPOLLERR or EPOLLHUP: ask SO_ERROR
	Tick                    // the timer of the node is due
	Own                     // the first bit that is the task's
)

// Task is something that a Loop serves. Both methods are called on the loop's goroutine.
type Task interface {
	// Turn does what the bits of Node.Got allow, for a bounded time, and clears those that are served. again means that
	// there is more to do after the others had their turn.
	Turn() (again bool)
	// Shutdown is called when the loop ends: the task releases what it holds and tells its owner.
	Shutdown()
}

// Node is what a Loop knows of a Task. It is embedded in the task and must not be copied. Init comes first.
type Node struct {
	task Task

	// Written by any goroutine. A node with hints is on the loop's list of notes, and next belongs to that list until the
	// loop takes the hints.
	hints atomic.Uint32
	next  *Node

	// Got is what happened and what may be possible. It belongs to the loop's goroutine.
	Got uint32

	queued bool          // in the run queue
	slot   int32         // index of Loop.slots, -1 when no socket is watched
	heapAt int32         // index of Loop.timers, -1 when no timer is set
	when   time.Duration // of the timer

	// The list of all members, under Loop.mu.
	before, after *Node
	listed        bool
}

// Init prepares n for the task t, in which it is embedded. It is called once, before everything else.
func (n *Node) Init(t Task) { n.task, n.slot, n.heapAt = t, -1, -1 }

// Join makes n a member, which the loop shuts down when it ends. false: the loop is closed, and n will get no turn.
func (l *Loop) Join(n *Node) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.closing.Load() {
		return false
	}
	n.listed = true
	if n.after = l.members; n.after != nil {
		n.after.before = n
	}
	l.members = n
	return true
}

// Leave ends the membership: the loop will not call Shutdown. It may be called more than once.
func (l *Loop) Leave(n *Node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !n.listed {
		return
	}
	n.listed = false
	if n.before != nil {
		n.before.after = n.after
	} else {
		l.members = n.after
	}
	if n.after != nil {
		n.after.before = n.before
	}
	n.before, n.after = nil, nil
}

// Note hands bits over to n, which gets a turn. It does not block and takes no lock: callers may hold any.
func (l *Loop) Note(n *Node, bits uint32) {
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
	l.unpark()
}

// unpark wakes the loop if it waits, or is about to.
func (l *Loop) unpark() {
	if l.parked.Load() && l.parked.CompareAndSwap(true, false) {
		l.poll.Wake()
	}
}

// takeNotes moves everything noted to the run queue, oldest first.
func (l *Loop) takeNotes() {
	if l.notes.Load() == nil {
		return
	}
	var first *Node
	for n := l.notes.Swap(nil); n != nil; {
		next := n.next
		n.next = first
		first, n = n, next
	}
	for n := first; n != nil; {
		next := n.next
		n.next = nil // before the hints are taken: from then on it may be listed again
		n.Got |= n.hints.Swap(0)
		l.Enqueue(n)
		n = next
	}
}

// Enqueue gives n a turn in the next round.
func (l *Loop) Enqueue(n *Node) {
	if n.queued {
		return
	}
	n.queued = true
	l.run = append(l.run, n)
}
