// Package relay moves bytes between the two sides of a flow: a flow.Stream of the app and the socket of the upstream,
// or the app's datagrams and a UDP socket.
//
// A Loop is one goroutine with an epoll set. A relay that has nothing to do costs its struct and its kernel objects: no
// goroutine, no buffer. Run as many loops as there are cores to spare; a flow stays on its loop.
package relay
