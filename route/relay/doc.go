// Package relay moves bytes between the two sides of a flow: a flow.Stream of the app and the socket of the upstream,
// or the app's datagrams and a UDP socket.
//
// A Loop is one of package loop, which see. A relay that has nothing to do costs its struct and its kernel objects: no
// goroutine, no buffer. A flow stays on its loop for life, so nothing but notes crosses a thread.
//
// # Theory of operation
//
// A relay takes its socket over from the dial, which ran on the same loop, with its registration. What the stack tells
// (Relay.Opened, Relay.Ready) comes under locks of the stack and becomes a note. A turn has a budget for each direction, and
// what is left over waits for the next round behind all others.
//
// # How a relay ends
//
//	FIN      each direction passes its FIN on when everything before it was passed; after both: closed in order
//	RST      the dead side's last bytes are handed over, then the living side is reset:
//	           by the app       socket: wait until the send queue is acknowledged, SO_LINGER 0, close
//	           by the upstream  app: wait until Queued is 0, where the Stream tells it, Abort
//	         without progress for lingerLimit it is reset all the same
//
// On Linux a RST leaves the receive queue alone: FIONREAD and recv give what came before it and only then the error
// (TestKernelDataBeforeRST holds that). After a FIN, recv says 0 even if a RST followed: SO_ERROR tells.
//
// # Memory
//
// Copying is from the stack's slices to the socket and from the socket to the stack's buffer. A relay owns memory only
// while the socket refuses small slices that were already gathered: at most gatherCap bytes, given back when they are sent.
// Behind that, a side that does not read costs what its peer's buffers hold: the stack's send and receive buffers, and
// the socket's, which the kernel tunes between tcp_rmem[1] and tcp_rmem[2] (unless the flow was fast before it
// stalled, near the first). SO_RCVBUF is not set: it would end the tuning, and a proxy 200 ms away needs its megabytes.
package relay
