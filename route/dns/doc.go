// Package dns answers the app's DNS questions by asking a resolver over TCP through the upstream, so that port 53 works
// with proxies that carry no UDP, and no question leaves the host by another way.
//
// A question comes in by Handle, is checked (message.go) and given to the exchange (exchange.go), which puts it on a
// persistent, pipelined connection to the first resolver that works (RFC 7766) and checks the answer against the question. The
// Server (server.go) gives the answer the question's ID again, cuts it to the size that the asker can take (RFC 1035 4.2.1,
// RFC 6891 6.2.3) with TC set, and hands it to the reply function.
//
//	Server.Handle -> exchange.take -> exchange.run (owns the state) -> conn.write -> resolver
//	Server.finish <-                  exchange.run                  <- conn.read  <-
//
// Before that the Server looks for the answer in its cache (cache.go), and for somebody who asks the same at the time, whose answer
// it waits for then (flight.go).
//
// Goroutines: Run, and two for each open connection, of which there is at most one for each resolver; all end when Run
// returns.
//
// With a Pool, questions for addresses are answered in Handle, by fake.go, with addresses that stand for names: pool.go keeps
// which stands for which, and poolfile.go keeps that over a restart.
package dns
