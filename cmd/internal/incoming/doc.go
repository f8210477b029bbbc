// Package incoming lets peers behind a proxy connect to a program, by the BIND command of SOCKS (RFC 1928, section 4).
// For each port of the program it asks the upstream to listen, announces where, hands over the connection of the peer
// that comes, and asks again at once.
//
// A BIND carries one peer. Whether the next one gets the same port is the server's choice: dante gives the port that is
// asked for if it is free, which it is not while a connection that came to it is open.
package incoming
