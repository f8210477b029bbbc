// Package sniff reads, from the first bytes of a TCP connection, the name of the host that the program wants to reach: the
// server name of a TLS ClientHello (RFC 6066 section 3) or the Host field of an HTTP/1 request (RFC 9110 section 7.2).
//
// A program sends these bytes only after its SYN was answered. Start therefore answers the SYN, waits for the bytes for a
// bounded time, and hands over an Early, which is again a flow.StreamRequest: whoever carries the flow accepts or rejects it
// as any other request, and receives the bytes that were read before all others.
//
// What the program says need not be true. A name that was found here can choose a route; it proves nothing.
package sniff
