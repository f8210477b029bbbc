// Package flow defines the types that stack and route share: a Flow, the request for a TCP stream, the stream itself
// and the datagram. It imports only the standard library, so that neither side depends on the libraries of the other.
//
// The calls between the layers are:
//
//	stack  -> route   Handler (declared in stack): a StreamRequest for each new SYN, a burst of Packets
//	route  -> stack   StreamRequest.Accept or Reject, the methods of Stream and PacketWriter
//	stack  -> relay   Listener: events of an accepted stream
//
// No method in this package blocks. A party that waits for something gets a Listener call, which is a hint without
// data; it then reads or writes until ErrAgain.
package flow
