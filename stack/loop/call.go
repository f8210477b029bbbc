package loop

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Call lets the caller of a slow operation, such as a dial, cancel it. It is a context.Context without deadline and
// values, and costs nothing when it is embedded in the caller's own struct: the operation attaches a node of its
// loop, and Cancel notes that node. The zero value is ready to use. A Call must not be copied.
type Call struct {
	canceled atomic.Bool
	at       atomic.Pointer[Attached]

	mu   sync.Mutex
	done chan struct{} // created when Done is first called
}

// Attached is the node that is told when a Call is cancelled. It is embedded next to the node.
type Attached struct {
	Loop *Loop
	Node *Node
	Bit  uint32 // set in Node
}

var _ context.Context = (*Call)(nil)

// Attach arranges for a.Node to get a.Bit when c is cancelled, or now if it already is. It replaces an earlier
// attachment.
func (c *Call) Attach(a *Attached) {
	c.at.Store(a)
	if c.canceled.Load() {
		a.Loop.Note(a.Node, a.Bit)
	}
}

// Detach undoes Attach if a is attached. A bit that is already on its way still arrives.
func (c *Call) Detach(a *Attached) { c.at.CompareAndSwap(a, nil) }

// Cancel ends the operations done for c. It may be called from any goroutine, with any locks held, and more than
// once.
func (c *Call) Cancel() {
	if c.canceled.Swap(true) {
		return
	}
	if a := c.at.Load(); a != nil {
		a.Loop.Note(a.Node, a.Bit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done != nil {
		close(c.done)
	}
}

// Err implements context.Context. It returns context.Canceled after Cancel.
func (c *Call) Err() error {
	if c.canceled.Load() {
		return context.Canceled
	}
	return nil
}

// Done implements context.Context.
func (c *Call) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.canceled.Load() {
			close(c.done)
		}
	}
	return c.done
}

// Deadline implements context.Context. There is none.
func (c *Call) Deadline() (time.Time, bool) { return time.Time{}, false }

// Value implements context.Context. There are none.
func (c *Call) Value(any) any { return nil }
