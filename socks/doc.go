// Package socks is a client for SOCKS5 (RFC 1928, RFC 1929), SOCKS4, SOCKS4a and HTTP CONNECT, made for very many
// concurrent dials. It knows nothing of flows.
//
// A dial, and the control connection of an association, run on an event loop that the caller chooses; neither has a
// goroutine of its own. A granted dial hands over its socket together with its registration, so a relay on the same
// loop need not register it again. A Dialer holds the options that all dials share. A Client is one server, used
// through a Dialer: its methods Connect and Associate return at once and call back.
//
//	Dialer ── Client ── Connect(ctx, loop, dst, done)     done(s, nil): a connected, non-blocking socket
//	                 └─ Associate(ctx, loop, done)        done(a, nil): a.Dial() returns sockets connected to the relay,
//	                                                      or a.Stream() the connection of UDP over TCP
//
// A Group is several servers with failover. It has the same two methods and decides by the kind of error what to do
// next:
//
//	*ServerError   a fault of the server: not reached, closed early, malformed answer, refused credentials, or silence
//	               before it had the request. Another server may do better.
//	Reply          the server's answer about the target. It is final, except 7 and 8.
//	ErrSilent      no answer after the request was sent. The target is taken to be silent.
//	ErrEnded       the server closed the connection instead of answering. The target is taken to have refused.
//	ErrLate        a general failure that came late: the target is silent. It wraps a Reply.
//
// Any other error is that of the caller's context, ErrClosed, or a fault of this host (no descriptors, no permission
// to set a mark).
//
// The protocols themselves are implemented without I/O: Handshake for TCP, UDPCodec and UoTCodec for datagrams.
package socks
