package loop

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Call is held by the caller of something slow, a dial for instance, to cancel it. It is a context.Context without a
// deadline and without values, which costs nothing when it is embedded in the caller's own struct: whoever works for it on a
// loop attaches a node, and Cancel notes that node. The zero value works; it must not be copied.
type Call struct {
	canceled atomic.Bool
	at       atomic.Pointer[Attached]

	mu   sync.Mutex
	done chan struct{} // made when somebody asks for it
}

// Attached is the node that is told when a Call is canceled. It is embedded where the node is.
type Attached struct {
	Loop *Loop
	Node *Node
	Bit  uint32 // that Node gets
}

var _ context.Context = (*Call)(nil)

// Attach has a.Node get a.Bit when c is canceled, which may be now. It replaces what was attached before.
func (c *Call) Attach(a *Attached) {
	c.at.Store(a)
	if c.canceled.Load() {
		a.Loop.Note(a.Node, a.Bit)
	}
}

// Detach undoes Attach if a is what is attached. A bit that is on its way still comes.
func (c *Call) Detach(a *Attached) { c.at.CompareAndSwap(a, nil) }

// Cancel ends what is done for c. Any goroutine, with any locks, more than once.
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

// Err implements context.Context: context.Canceled after Cancel.
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

// Deadline implements context.Context: there is none.
func (c *Call) Deadline() (time.Time, bool) { return time.Time{}, false }

// Value implements context.Context: there are none.
func (c *Call) Value(any) any { return nil }
