// Package publish carries connections and datagrams from outside to a program that has a network namespace of its own,
// as the option --publish asks for. It listens in the host's namespace and connects by sockets that belong to the
// program's namespace. Therefore it also reaches a program that listens only on its loopback address.
//
// TCP is copied by the kernel (splice(2)). A FIN is passed on as a FIN, separately for each direction (RFC 9293,
// section 3.6), and a reset as a reset. If one side does not read, the other side cannot continue to write.
package publish
