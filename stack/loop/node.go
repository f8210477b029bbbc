package loop

import (
	"sync/atomic"
	"time"
)

// Bits of Node.Got. The bits from Own on are those of the task; Loop.Note sets them.
const (
	In   uint32 = 1 << iota // the socket may have data, FIN or an error
	Out                     // the socket may take data
	Hup                     // the peer's FIN or RST has arrived: read until a read returns it
	Err                     // EPOLLERR or EPOLLHUP: read SO_ERROR
	Tick                    // the timer of the node is due
	Own                     // the first bit of the task
)

// Task is something that a Loop serves. Both methods are called on the loop's goroutine.
type Task interface {
	// Turn does what the bits of Node.Got allow, for a limited time, and clears those that it has served. again means
	// that there is more to do after the others have had their turn.
	Turn() (again bool)
	// Shutdown is called when the loop ends. The task releases its resources and tells its owner.
	Shutdown()
}

// Node is the loop's record of a Task. It is embedded in the task and must not be copied. Call Init first.
type Node struct {
	task Task

	// Written by any goroutine. A node with hints is on the loop's list of notes, and next belongs to that list until
	// the loop takes the hints.
	hints atomic.Uint32
	next  *Node

	// Got records what happened and what may be possible. It belongs to the loop's goroutine.
	Got uint32

	queued bool          // is in the run queue
	slot   int32         // index in Loop.slots; -1: no socket is watched
	heapAt int32         // index in Loop.timers; -1: no timer is set
	when   time.Duration // time of the timer

	// Links of the list of all members, guarded by Loop.mu.
	before, after *Node
	listed        bool
}

// Init prepares n for the task t, in which it is embedded. It must be called once, before all else.
func (n *Node) Init(t Task) { n.task, n.slot, n.heapAt = t, -1, -1 }

// Join makes n a member, which the loop shuts down when it ends. It returns false if the loop is closed; n then gets
// no turn.
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

// Note passes bits to n, which gets a turn. It does not block and takes no lock, so callers may hold any.
func (l *Loop) Note(n *Node, bits uint32) {
	if n.hints.Or(bits) != 0 {
		return // it is already listed, and the goroutine that listed it wakes the loop
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

// unpark wakes the loop if it waits or is about to wait.
func (l *Loop) unpark() {
	if l.parked.Load() && l.parked.CompareAndSwap(true, false) {
		l.poll.Wake()
	}
}

// takeNotes moves all noted nodes to the run queue, oldest first.
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
		n.next = nil // before the hints are taken, because the node may then be listed again
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
