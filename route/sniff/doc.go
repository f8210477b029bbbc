// Package sniff reads, from the first bytes of a TCP connection, the name of the host that the program wants to
// reach: the server name of a TLS ClientHello (RFC 6066, section 3) or the Host field of an HTTP/1 request (RFC 9110,
// section 7.2).
//
// A program sends these bytes only after its SYN was answered. Start therefore answers the SYN, waits for the bytes
// for a limited time, and passes on an Early, which is again a flow.StreamRequest: it is accepted or rejected like
// any other request, and the stream begins with the bytes that were read.
//
// A name found here need not be true. It can choose a route; it proves nothing.
package sniff
