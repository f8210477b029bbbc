// Package socks is a SOCKS5 client (RFC 1928, RFC 1929) made for very many dials at once: it knows nothing of flows.
//
// A dial runs on an event loop that its caller chooses, and so does the control connection of an association: neither has a
// goroutine of its own. A granted dial hands its socket over with its registration, so whoever relays on the same loop need not
// register it again. A Dialer holds the options that all dials share. A Client is one server seen through a Dialer: its Connect
// and Associate return at once and call back.
//
//	Dialer ── Client ── Connect(ctx, loop, dst, done)     done(s, nil): a connected, non-blocking socket
//	                 └─ Associate(ctx, loop, done)        done(a, nil): a.Dial() gives sockets connected to the relay,
//	                                                      or a.Stream() the connection of UDP over TCP
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
