package socks

import (
	"errors"
	"fmt"
)

// Handshake is the client side of a proxy protocol without I/O: SOCKS5 (RFC 1928, RFC 1929), SOCKS4 and 4a, or HTTP
// CONNECT (RFC 9110, section 9.3.6). Client and server take turns, so at any time either Output or Input is not
// empty:
//
//	for !h.Done() {
//		if out := h.Output(); len(out) > 0 {
//			h.Sent(write(out))
//		} else if err := h.Received(read(h.Input())); err != nil {
//			return err
//		}
//	}
//
// Input never asks for a byte past the reply, so the first bytes of the target stay in the socket. A Handshake
// belongs to one goroutine.
type Handshake interface {
	// Output returns the bytes to send now. It is empty when it is the server's turn.
	Output() []byte
	// Sent reports that n bytes of Output were sent.
	Sent(n int)
	// Input returns room for the bytes that are needed next. The caller may fill all of it, and must read nothing
	// more. It is empty when it is the client's turn, or when the handshake is done.
	Input() []byte
	// Received reports that n bytes of Input were filled. The error is ErrMalformed, ErrMethod, ErrCredentials, or a
	// refusal that wraps a Reply. After an error the Handshake must not be used any more.
	Received(n int) error
	// Done reports whether the request was granted.
	Done() bool
	// Bound returns the endpoint that the reply names. It is valid once Done returns true.
	Bound() Addr

	// Requesting reports whether Output contains the request: everything that can be learned without one is known.
	// SOCKS4 and HTTP begin with the request.
	Requesting() bool
	// Requested reports whether the whole request was sent. From then on the server may be waiting for the target.
	Requested() bool
	// Answered reports whether at least one byte of the reply has arrived.
	Answered() bool

	// LoggingIn reports whether user and password are being sent in a message of their own.
	LoggingIn() bool

	// Again makes a BIND that is Done wait for its second reply.
	Again()
}

// protocol is the protocol that a server speaks.
type protocol uint8

const (
	protoSOCKS5 protocol = iota
	protoSOCKS4
	protoSOCKS4a
	protoHTTP
)

func (p protocol) String() string { return [...]string{"SOCKS5", "SOCKS4", "SOCKS4a", "HTTP"}[p] }

// ErrCannotExpress means that the server's protocol cannot express the request, such as an IPv6 address or a name in
// SOCKS4, or a UDP association in HTTP. Nothing was sent. A server with another protocol may do better. The error
// also wraps ReplyCommandNotSupported or ReplyAddrTypeNotSupported.
var ErrCannotExpress = errors.New("the proxy's protocol cannot express the request")

// inexpressible is an error that wraps ErrCannotExpress.
type inexpressible struct {
	proto protocol
	what  string
	reply Reply
}

func (e *inexpressible) Error() string { return fmt.Sprintf("%v cannot carry %s", e.proto, e.what) }

// Unwrap returns ErrCannotExpress and the Reply that a server would have given.
func (e *inexpressible) Unwrap() []error { return []error{ErrCannotExpress, e.reply} }

// refusal is the answer of a server that does not speak SOCKS5, in its own words and as a Reply.
type refusal struct {
	text  string
	reply Reply
}

func (e *refusal) Error() string { return e.text }

// Unwrap returns the Reply.
func (e *refusal) Unwrap() error { return e.reply }

// NewHandshake starts a handshake that asks s for dst, with the credentials of s if it has any. It fails if the
// request cannot be expressed: dst is empty, its name is too long, or the error is ErrCannotExpress.
func NewHandshake(s Server, cmd Command, dst Addr) (Handshake, error) {
	return newHandshake(new(socks5), s.proto, s.login, cmd, dst)
}

// newHandshake uses h for SOCKS5, so that a dial that contains h allocates nothing more.
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
