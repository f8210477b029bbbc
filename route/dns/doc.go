// Package dns answers the app's DNS questions by asking resolvers through the upstream, over TCP, TLS or HTTPS, so that port 53
// works with proxies that carry no UDP, and no question leaves the host by another way.
//
// A question comes in by Handle, is checked (message.go) and given to the exchange (exchange.go), which puts it on the link
// (link.go) to the first resolver that works and checks the answer against the question. A link is a persistent, pipelined
// stream (conn.go: RFC 7766, 7858), a connection of HTTP/2 (https.go: RFC 8484), or a Tor (tor.go). The Server (server.go) gives
// the answer the question's ID again, cuts it to the size that the asker can take (RFC 1035 4.2.1, RFC 6891 6.2.3) with TC set,
// and hands it to the reply function.
//
//	Server.Handle -> exchange.take -> exchange.run (owns the state) -> link.send -> resolver
//	Server.finish <-                  exchange.run                  <- messages  <-
//
// Before that the Server looks for the answer in its cache (cache.go), and for somebody who asks the same at the time, whose
// answer it waits for then (flight.go).
//
// Goroutines: Run, two for each open stream, of which there is at most one for each resolver, and one for each question that is
// on its way by HTTPS or to a Tor; all end when Run returns.
//
// With a Pool, questions for addresses are answered in Handle, by fake.go, with addresses that stand for names: pool.go keeps
// which stands for which, and poolfile.go keeps that over a restart.
package dns
