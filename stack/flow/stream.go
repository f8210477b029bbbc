package flow

import (
	"errors"
	"io"
)

var (
	// ErrAgain: nothing can be done now; wait for Listener.Ready.
	ErrAgain = errors.New("not ready")
	// ErrReset: the app's end was reset, or aborted by us. Once seen it is latched: both directions return it.
	ErrReset = errors.New("reset by the app")
)

// Events is a set of hints about a Stream.
type Events uint8

const (
	Readable Events = 1 << iota // data or FIN may be there to read
	Writable                    // there may be room to write
	Hup                         // the app's end may be gone: read, and the error tells
)

// StreamRequest is a TCP connection that the app waits for: a SYN is held, and no goroutine. The first of Accept,
// Reject and the app's giving up wins; later calls do nothing. No method blocks, and all may be called from any
// goroutine.
type StreamRequest interface {
	Flow() Flow
	// OnCancel sets what is called when the app gave up, at once if it already has. It is called at most once, and
	// never after Accept or Reject has won. One function only: a second call replaces the first.
	OnCancel(func())
	// Accept answers the SYN. Listener.Opened follows, exactly once, from another goroutine: with the app's end, or
	// with an error if the app is gone (also when it had given up before Accept was called).
	Accept(Listener)
	// Reject refuses the connection. The same answer is given again to retransmissions of the SYN.
	Reject(Refusal)
}

// Listener is told what happened to an accepted stream. Locks of the stack may be held: note it, wake a loop, return.
// Calls may come from several goroutines at once.
type Listener interface {
	// Opened: the handshake is over. The receiver owns the Stream and must Close it. After an error no other call comes.
	Opened(Stream, error)
	// Ready is a hint, never proof. It may come before Opened has returned.
	Ready(Events)
}

// Stream is the app's end of an accepted TCP connection. Nothing blocks. ReadTo, WriteFrom and CloseWrite belong to one
// goroutine at a time; Abort and Close may be called from any, and more than once.
type Stream interface {
	// ReadTo hands received bytes to w in the stack's own slices, which are lent for the call. w is called with locks of
	// the stack held: it must not block and must not call the Stream. A short write by w ends the turn without an
	// error, and what w did not take stays queued. io.EOF: the app sent FIN and everything before it was handed over.
	// ErrAgain: nothing there. ErrReset: latched.
	ReadTo(w io.Writer) (n int, err error)
	// WriteFrom lets p read straight into the stack's buffer. It takes what the send window allows: n may be less than
	// p.Len(), and then p was asked for no more than n bytes. n < the bytes that p gave: data was lost, Abort.
	// ErrAgain: no room, p was not asked.
	WriteFrom(p Payload) (n int, err error)
	// CloseWrite sends FIN after what was written.
	CloseWrite() error
	// Abort sends RST and drops what is queued.
	Abort()
	// Close gives everything back. If both FINs were not exchanged in order it is as Abort.
	Close() error
}

// Payload is bytes of known length: Read must deliver what Len promised.
type Payload interface {
	io.Reader
	Len() int
}
