// Package publish carries connections and datagrams from outside to a program that has a network namespace of its own, as the
// option --publish asks for. It listens in the host's namespace and connects inside, by sockets that belong to the program's
// namespace, so that also a program which listens on its own loopback address is reached.
//
// TCP is copied by the kernel (splice(2)). The end of a stream is passed on in each direction by itself, as a FIN (RFC 9293,
// section 3.6), and a reset as a reset. A side that does not read holds the other side back.
package publish
