package socks

import (
	"errors"
	"fmt"

	"github.com/viasocks/viasocks/stack/loop"
)

var (
	// ErrSilent: the request was sent, and no byte of an answer came within the handshake timeout. It is taken for the
	// target's silence, not for a fault of the server.
	ErrSilent = errors.New("no answer to the request")
	// ErrEnded: the request was sent, and the server closed the connection in order without a byte of an answer. OpenSSH
	// -D says so that the target refused. It is taken for the target's failure, not for a fault of the server.
	ErrEnded = errors.New("the server closed the connection without an answer to the request")
	// ErrLate: the server answered 1 (general failure) so late that it must have waited for a silent target. It wraps the
	// Reply.
	ErrLate = errors.New("the target is silent")
	// ErrAllDown: no server of a group works. Inside a *ServerError.
	ErrAllDown = errors.New("none of its servers works")
	// ErrClosed: the loop or the Dialer was closed.
	ErrClosed = loop.ErrClosed

	// ErrCredentials: the server refused the user and password (RFC 1929). Inside a *ServerError.
	ErrCredentials = errors.New("user or password refused")
	// ErrNoPassword: the server hung or closed when it was given a user without a password (socksv5 and
	// @pondwader/socks5-server do so). Inside a *ServerError, with what happened.
	ErrNoPassword = errors.New("it takes no user without a password")
	// ErrMethod: the server accepts none of the authentication methods that were offered. Inside a *ServerError.
	ErrMethod = errors.New("no offered authentication method is accepted")
	// ErrMalformed: the server's answer is not of the protocol that its URL names. Inside a *ServerError.
	ErrMalformed = errors.New("malformed answer")
)

var (
	errAlwaysEnds   = errors.New("it closes the connection without an answer for any destination")
	errAlwaysSilent = errors.New("it answers no request for any destination")
	errServerDown   = errors.New("the server no longer works")
)

// Reply is the REP field of a server's answer, RFC 1928 section 6. As an error it is the server's word about the
// target; ReplySucceeded is never returned as one.
type Reply byte

// The replies of RFC 1928. Higher values are unassigned, and are passed on as they come.
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

// Error is RFC 1928's wording and the number.
func (r Reply) Error() string {
	if i := int(r) - int(ReplyOnionNotFound); i >= 0 && i < len(torReplies) {
		return fmt.Sprintf("Tor answered %X (%s)", byte(r), torReplies[i])
	}
	if int(r) < len(replyNames) {
		return fmt.Sprintf("the SOCKS server answered %d (%s)", byte(r), replyNames[r])
	}
	return fmt.Sprintf("the SOCKS server answered %d", byte(r))
}

// What was being done when a server failed.
const (
	OpResolve      = "resolve"
	OpConnect      = "connect to"
	OpSecure       = "speak TLS with"
	OpHandshake    = "use"
	OpAuthenticate = "log in to"
	OpAssociation  = "keep an association at"
	OpGroup        = "use the group"
)

// ServerError is a fault of the server, not of the target.
type ServerError struct {
	Server string // its URL without credentials
	Op     string // one of the Op constants
	Err    error  // os.ErrDeadlineExceeded, io.ErrUnexpectedEOF, an errno, ErrMalformed, ErrCredentials, ErrMethod …
}

// Error reads "cannot connect to socks5://10.0.0.1:1080: connection refused".
func (e *ServerError) Error() string {
	return "cannot " + e.Op + " " + e.Server + ": " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *ServerError) Unwrap() error { return e.Err }
