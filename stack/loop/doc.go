// Package loop is the event loop of viasocks: one goroutine that serves very many sockets. Dials, relays, packet
// links and associations all run on it, so a flow can stay on one loop from its SYN to its end. The package knows
// sockets and nothing of what is sent over them.
//
//	Loop    the goroutine of Run: takes events, notes and timers, and gives turns
//	Node    the loop's record of one thing that it serves; embedded in that thing, so that nothing is allocated
//	Task    the thing itself, which gets turns
//	Socket  a descriptor that moves from one Node to another with its registration
//	Call    lets the caller of a slow operation cancel it; a context.Context
//	Poller  an epoll set that waits in the Go runtime's poller
//
// # Theory of operation
//
// A Node is registered once for its socket, edge-triggered, and never touched again: a connection costs one
// EPOLL_CTL_ADD. Other goroutines reach a node through Loop.Note, which sets bits in Node.hints and puts the node on
// a lock-free list. It takes no lock and does not block, so its callers may hold any lock. Events, notes and timers
// all become bits of Node.Got, which only the loop reads and writes. The bits In and Out mean "may be possible": they
// stay set until an attempt has shown the contrary. A node that has received a bit gets a turn in the next round, in
// order of arrival. Each task limits its own turn; a task that has more to do says so and waits behind all others.
//
// The loop runs inside the call that waits (Poller.Serve), so it polls its sockets once for each wake-up: an event
// that arrives after the poll ends the next wait at once, and the loop need not poll again before it waits.
//
// A task that passes its socket to another one (a dial to a relay) calls HandOver, and the other calls Adopt. Both
// happen in one turn, so no event is lost between them. Data that was readable before stays readable without a new
// edge. Adopt therefore sets In and Out, and the first turn finds out.
//
// # Concurrency
//
// Note, Join, Leave, Post, Close and Gone may be called from any goroutine. Everything else belongs to the loop's
// goroutine, that is, to the turns of its tasks and the functions that they call.
package loop
