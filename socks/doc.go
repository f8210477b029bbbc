// Package socks is a SOCKS5 client (RFC 1928, RFC 1929) made for very many dials at once: it knows nothing of flows.
//
// A Dialer owns one goroutine, an event loop, which serves all pending dials and the control connections of all
// associations. Neither has a goroutine of its own. A Client is one server seen through a Dialer: its Connect and
// Associate return at once and call back.
//
//	Dialer ── Client ── Connect(ctx, dst, done)     done(fd, nil): a connected, non-blocking socket
//	                 └─ Associate(ctx, done)        done(a, nil): a.Dial() gives sockets connected to the relay
//
// Connect and Associate are the whole of what a caller needs of an upstream: a group of servers with failover will
// have the same two methods, and chooses by the kind of error. There are three kinds.
//
//	*ServerError   the server's fault: not reached, closed early, malformed answer, refused credentials, or silent
//	               before it had the request. Another server may do better.
//	Reply          the server's answer about the target. Final, but for 7 and 8.
//	ErrSilent      no answer after the request was sent: taken for the target's silence.
//	ErrEnded       the server closed the connection in place of an answer: taken for the target's refusal.
//	ErrLate        a general failure that came late: the target is silent. It wraps a Reply.
//
// Anything else is the caller's context, ErrClosed, or this host's fault (no descriptors, no permission to mark).
//
// The protocol itself is without I/O: Handshake for the TCP part, AppendUDPHeader and ParseUDPHeader for datagrams.
package socks
