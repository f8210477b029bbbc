// Package loop is the event loop of viasocks: one goroutine that serves very many sockets. Dials, relays, packet links and
// associations all run on it, so a flow can stay on one loop from its SYN to its end. It is a leaf: it knows sockets and
// nothing of what is said on them.
//
//	Loop    the goroutine of Run: takes events, notes and timers, and gives turns
//	Node    what a Loop knows of one thing that it serves; embedded in that thing, so that nothing is allocated
//	Task    the thing itself: it gets turns
//	Socket  a descriptor that goes from one Node to another with its registration
//	Call    what the caller of something slow holds, to cancel it; a context.Context
//	Poller  an epoll set that waits in the Go runtime's poller
//
// # Theory of operation
//
// A Node is registered once for its socket, edge-triggered, and never touched again: a connection costs one EPOLL_CTL_ADD.
// What other goroutines have to tell goes through Loop.Note, which sets bits in Node.hints and puts the node on a lock-free
// list. It takes no lock and does not block, so its callers may hold any lock. Events, notes and timers all end as bits of
// Node.Got, which only the loop reads and writes. The bits In and Out mean "may be possible": they stay set until an attempt
// has shown the contrary. A node that got something has a turn in the next round, in order of arrival. A turn is bounded by
// the task itself; a task that has more to do says so, and waits behind all others.
//
// The loop runs inside the call that waits (Poller.Serve), so it asks its sockets once for each wake-up: an event that comes
// after the question ends the next wait at once, and the question need not be put again before the loop waits.
//
// A task that hands its socket to another one (a dial to a relay) calls HandOver; the other calls Adopt. Both happen in one
// turn, so no event is lost between them. Data that was readable before stays readable without a new edge, therefore Adopt
// sets In and Out, and the first turn finds out.
//
// # Who may call what
//
// Note, Join, Leave, Post, Close and Gone may be called from any goroutine. Everything else belongs to the loop's goroutine,
// which means the turns of its tasks, and the functions that those call.
package loop
