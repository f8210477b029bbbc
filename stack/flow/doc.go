// Package flow holds the nouns that stack and route share: a Flow, the request for a TCP stream, the stream itself
// and the datagram. It imports the standard library only, so that neither side of the seam drags the other's
// libraries along.
//
// Who calls whom:
//
//	stack  -> route   Handler (declared in stack): a StreamRequest for each new SYN, a burst of Packets
//	route  -> stack   StreamRequest.Accept or Reject, the Stream's methods, the PacketWriter's methods
//	stack  -> relay   Listener: what happened to an accepted stream
//
// Nothing in this package blocks. What waits for something is told by a Listener call that carries a hint and no
// data; the one who is told then reads or writes until ErrAgain.
package flow
