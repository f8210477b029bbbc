// Package dns answers the app's DNS questions by asking resolvers through the upstream, over TCP, TLS or HTTPS. Port
// 53 therefore works with proxies that do not carry UDP, and no question leaves the host by another way.
//
// A question arrives at Handle, is checked (message.go) and passed to the exchange (exchange.go), which sends it on
// the link (link.go) to the first resolver that works and checks the answer against the question. A link is a
// persistent, pipelined stream (conn.go: RFC 7766, 7858), an HTTP/2 connection (https.go: RFC 8484), or a Tor
// (tor.go). The Server (server.go) restores the question's ID in the answer, truncates it to the size that the asker
// accepts (RFC 1035, section 4.2.1; RFC 6891, section 6.2.3) with TC set, and passes it to the reply function.
//
//	Server.Handle -> exchange.take -> exchange.run (owns the state) -> link.send -> resolver
//	Server.finish <-                  exchange.run                  <- messages  <-
//
// Before that, the Server looks for the answer in its cache (cache.go), and for the same question in progress, whose
// answer it then waits for (flight.go).
//
// Goroutines: Run, two for each open stream, of which there is at most one for each resolver, and one for each
// question in progress over HTTPS or to a Tor. All of them end when Run returns.
//
// With a Pool, Handle answers questions for addresses by fake addresses, which stand for names (fake.go). pool.go
// stores which address stands for which name, and poolfile.go keeps this over a restart.
package dns
