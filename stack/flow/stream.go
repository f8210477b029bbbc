package flow

import (
	"errors"
	"io"
)

var (
	// ErrAgain means that nothing can be done now: wait for Listener.Ready.
	ErrAgain = errors.New("not ready")
	// ErrReset means that the app's end was reset, or that we aborted it. Once it occurs, both directions return it
	// from then on.
	ErrReset = errors.New("reset by the app")
)

// Events is a set of hints about a Stream.
type Events uint8

const (
	Readable Events = 1 << iota // data or FIN may be there to read
	Writable                    // there may be room to write
	Hup                         // the app's end may be gone: a read returns the error
)

// StreamRequest is a TCP connection that the app waits for. It holds a SYN and no goroutine. The first of Accept,
// Reject and the app's giving up wins; later calls have no effect. No method blocks, and all may be called from any
// goroutine.
type StreamRequest interface {
	Flow() Flow
	// OnCancel sets the function that is called when the app has given up, or at once if it already has. It is called
	// at most once, and never after Accept or Reject has won. A second call of OnCancel replaces the function.
	OnCancel(func())
	// Accept answers the SYN. Listener.Opened is then called exactly once, from another goroutine: with the app's
	// end, or with an error if the app is gone, even if it had given up before Accept was called.
	Accept(Listener)
	// Reject refuses the connection. Retransmissions of the SYN get the same answer again.
	Reject(Refusal)
}

// Listener receives the events of an accepted stream. The caller may hold locks of the stack: an implementation must
// record the event, wake a loop and return. Calls may come from several goroutines at once.
type Listener interface {
	// Opened is called when the handshake is over. The receiver owns the Stream and must Close it. After an error
	// there is no further call.
	Opened(Stream, error)
	// Ready is a hint and no guarantee. It may be called before Opened has returned.
	Ready(Events)
}

// Stream is the app's end of an accepted TCP connection. No method blocks. ReadTo, WriteFrom and CloseWrite may be
// used by one goroutine at a time; Abort and Close may be called from any goroutine, and more than once.
type Stream interface {
	// ReadTo passes received bytes to w in the stack's own slices, which are valid only during the call. w is called
	// with locks of the stack held: it must not block and must not call the Stream. A short write by w ends the turn
	// without an error, and the bytes that w did not take stay queued. The error is io.EOF if the app sent FIN and
	// everything before it was passed on, ErrAgain if there is nothing now, or ErrReset.
	ReadTo(w io.Writer) (n int, err error)
	// WriteFrom lets p read directly into the stack's buffer. It takes as much as the send window allows: n may be
	// less than p.Len(), and p was then asked for no more than n bytes. If n is less than the number of bytes that p
	// gave, data was lost and the caller must Abort. ErrAgain means that there is no room; p was not called.
	WriteFrom(p Payload) (n int, err error)
	// CloseWrite sends FIN after the bytes that were written.
	CloseWrite() error
	// Abort sends RST and discards what is queued.
	Abort()
	// Close releases everything. Unless both FINs were exchanged in order, it acts like Abort.
	Close() error
}

// Payload is a number of bytes known in advance: Read must deliver as many as Len promised.
type Payload interface {
	io.Reader
	Len() int
}
