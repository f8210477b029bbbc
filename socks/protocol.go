package socks

import (
	"errors"
	"fmt"
)

// Handshake is the client's side of a proxy protocol without I/O: SOCKS5 (RFC 1928, RFC 1929), SOCKS4 and 4a, or HTTP
// CONNECT (RFC 9110, section 9.3.6). Client and server speak in turns, so at any time either Output or Input has something:
//
//	for !h.Done() {
//		if out := h.Output(); len(out) > 0 {
//			h.Sent(write(out))
//		} else if err := h.Received(read(h.Input())); err != nil {
//			return err
//		}
//	}
//
// Input never asks for a byte behind the reply, so what the target says first stays in the socket. A Handshake belongs
// to one goroutine.
type Handshake interface {
	// Output is what is to be sent now, empty when it is the server's turn.
	Output() []byte
	// Sent tells that n bytes of Output were sent.
	Sent(n int)
	// Input is the room for the bytes that are needed next: all of it may be read, and nothing more. It is empty when it is
	// our turn, or when all is done.
	Input() []byte
	// Received tells that n bytes of Input were filled. An error is ErrMalformed, ErrMethod, ErrCredentials, or a refusal
	// that wraps a Reply. After an error the Handshake is of no more use.
	Received(n int) error
	// Done reports whether the request was granted.
	Done() bool
	// Bound is the endpoint that the reply names, once Done.
	Bound() Addr

	// Requesting reports whether Output holds the request: all that can be found out without one is known. SOCKS4 and HTTP
	// begin with it.
	Requesting() bool
	// Requested reports whether the whole request was sent: from then on the server may be waiting for the target.
	Requested() bool
	// Answered reports whether a byte of the reply came.
	Answered() bool

	// LoggingIn reports whether user and password are on their way in a message of their own.
	LoggingIn() bool

	// Again makes a BIND that is Done wait for its second reply.
	Again()
}

// protocol is what is spoken with a server.
type protocol uint8

const (
	protoSOCKS5 protocol = iota
	protoSOCKS4
	protoSOCKS4a
	protoHTTP
)

func (p protocol) String() string { return [...]string{"SOCKS5", "SOCKS4", "SOCKS4a", "HTTP"}[p] }

// ErrCannotExpress: the protocol of this server has no words for the request: an IPv6 address or a name for SOCKS4, a UDP
// association for HTTP. Nothing was sent. A server that speaks another protocol may do better. The error also wraps
// ReplyCommandNotSupported or ReplyAddrTypeNotSupported.
var ErrCannotExpress = errors.New("the proxy's protocol cannot express the request")

// inexpressible is an ErrCannotExpress.
type inexpressible struct {
	proto protocol
	what  string
	reply Reply
}

func (e *inexpressible) Error() string { return fmt.Sprintf("%v cannot carry %s", e.proto, e.what) }

// Unwrap gives ErrCannotExpress and the Reply that a server would have given.
func (e *inexpressible) Unwrap() []error { return []error{ErrCannotExpress, e.reply} }

// refusal is the answer of a server whose protocol is not SOCKS5: in its own words, and as a Reply.
type refusal struct {
	text  string
	reply Reply
}

func (e *refusal) Error() string { return e.text }

// Unwrap gives the Reply.
func (e *refusal) Unwrap() error { return e.reply }

// NewHandshake starts a handshake that asks s for dst with its credentials, if it has any. An error means that the request
// cannot be put into words: dst is empty or its name too long, or ErrCannotExpress.
func NewHandshake(s Server, cmd Command, dst Addr) (Handshake, error) {
	return newHandshake(new(socks5), s.proto, s.login, cmd, dst)
}

// newHandshake uses h for SOCKS5, so that a dial that contains it allocates nothing more.
func newHandshake(h *socks5, p protocol, l *login, cmd Command, dst Addr) (Handshake, error) {
	if err := dst.check(); err != nil {
		return nil, fmt.Errorf("cannot ask for %v: %w", dst, err)
	}
	switch p {
	case protoSOCKS4, protoSOCKS4a:
		return newSOCKS4(p, l, cmd, dst)
	case protoHTTP:
		return newHTTP(l, cmd, dst)
	}
	h.start(l, cmd, dst)
	return h, nil
}
