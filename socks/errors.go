package socks

import (
	"errors"
	"fmt"

	"github.com/viasocks/viasocks/stack/loop"
)

var (
	// ErrSilent means that the request was sent and no byte of an answer came within the handshake timeout. The
	// target is taken to be silent; the server is not at fault.
	ErrSilent = errors.New("no answer to the request")
	// ErrEnded means that the request was sent and the server closed the connection in order, without a byte of an
	// answer. OpenSSH -D does so when the target refused. It counts as a failure of the target, not as a fault of the
	// server.
	ErrEnded = errors.New("the server closed the connection without an answer to the request")
	// ErrLate means that the server answered 1 (general failure) so late that it must have waited for a silent
	// target. It wraps the Reply.
	ErrLate = errors.New("the target is silent")
	// ErrAllDown means that no server of a group works. It comes inside a *ServerError.
	ErrAllDown = errors.New("none of its servers works")
	// ErrClosed means that the loop or the Dialer was closed.
	ErrClosed = loop.ErrClosed

	// ErrCredentials means that the server refused the user and password (RFC 1929). It comes inside a *ServerError.
	ErrCredentials = errors.New("user or password refused")
	// ErrNoPassword means that the server hung, or closed the connection, when it was given a user without a password
	// (socksv5 and @pondwader/socks5-server do so). It comes inside a *ServerError, with the event.
	ErrNoPassword = errors.New("it does not accept a user without a password")
	// ErrMethod means that the server accepts none of the offered authentication methods. It comes inside a
	// *ServerError.
	ErrMethod = errors.New("it accepts none of the offered authentication methods")
	// ErrMalformed means that the server's answer does not follow the protocol that its URL names. It comes inside a
	// *ServerError.
	ErrMalformed = errors.New("malformed answer")
)

var (
	errAlwaysEnds   = errors.New("it closes the connection without an answer for any destination")
	errAlwaysSilent = errors.New("it answers no request for any destination")
	errServerDown   = errors.New("the server no longer works")
)

// Reply is the REP field of a server's answer (RFC 1928, section 6). As an error it is the server's statement about
// the target; ReplySucceeded is never returned as an error.
type Reply byte

// The replies of RFC 1928. Higher values are unassigned and are passed on unchanged.
const (
	ReplySucceeded            Reply = 0
	ReplyGeneralFailure       Reply = 1
	ReplyNotAllowed           Reply = 2
	ReplyNetUnreachable       Reply = 3
	ReplyHostUnreachable      Reply = 4
	ReplyRefused              Reply = 5
	ReplyTTLExpired           Reply = 6
	ReplyCommandNotSupported  Reply = 7
	ReplyAddrTypeNotSupported Reply = 8
)

var replyNames = [...]string{
	"succeeded", "general failure", "not allowed by ruleset", "network unreachable", "host unreachable",
	"connection refused", "TTL expired", "command not supported", "address type not supported",
}

// Error returns the wording of RFC 1928 and the number.
func (r Reply) Error() string {
	if i := int(r) - int(ReplyOnionNotFound); i >= 0 && i < len(torReplies) {
		return fmt.Sprintf("Tor answered %X (%s)", byte(r), torReplies[i])
	}
	if int(r) < len(replyNames) {
		return fmt.Sprintf("the SOCKS server answered %d (%s)", byte(r), replyNames[r])
	}
	return fmt.Sprintf("the SOCKS server answered %d", byte(r))
}

// Values of ServerError.Op: what was being done when the server failed.
const (
	OpResolve      = "resolve"
	OpConnect      = "connect to"
	OpSecure       = "speak TLS with"
	OpHandshake    = "use"
	OpAuthenticate = "log in to"
	OpAssociation  = "keep an association at"
	OpGroup        = "use the group"
)

// ServerError is a fault of the server, as opposed to one of the target.
type ServerError struct {
	Server string // its URL without credentials
	Op     string // one of the Op constants
	Err    error  // os.ErrDeadlineExceeded, io.ErrUnexpectedEOF, an errno, ErrMalformed, ErrCredentials, ErrMethod …
}

// Error returns a text such as "cannot connect to socks5://10.0.0.1:1080: connection refused".
func (e *ServerError) Error() string {
	return "cannot " + e.Op + " " + e.Server + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *ServerError) Unwrap() error { return e.Err }
