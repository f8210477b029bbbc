// Package relay moves bytes between the two sides of a flow: a flow.Stream of the app and the socket of the upstream,
// or the app's datagrams and a UDP socket.
//
// Loop extends the event loop of package loop. A relay that has nothing to do costs its struct and its kernel
// objects, but no goroutine and no buffer. A flow stays on its loop for life, so only notes cross threads.
//
// # Theory of operation
//
// A relay takes over its socket, with its registration, from the dial that ran on the same loop. Calls from the stack
// (Relay.Opened, Relay.Ready) come under locks of the stack and become notes. A turn has a budget for each direction;
// what is left waits for the next round, behind all others.
//
// # How a relay ends
//
//	FIN      each direction passes its FIN on after everything before it was passed on; after both, the flow is closed in order
//	RST      the last bytes of the dead side are passed on, then the living side is reset:
//	           by the app       socket: wait until the send queue is acknowledged, SO_LINGER 0, close
//	           by the upstream  app: wait until Queued is 0, if the Stream reports it, then Abort
//	         without progress for lingerLimit, it is reset anyway
//
// On Linux a RST does not affect the receive queue: FIONREAD and recv return what came before it, and only then the
// error (TestKernelDataBeforeRST checks this). After a FIN, recv returns 0 even if a RST followed; SO_ERROR tells.
//
// # Memory
//
// Data is copied from the stack's slices to the socket, and from the socket to the stack's buffer. A relay owns
// memory only while the socket refuses small slices that were already gathered: at most gatherCap bytes, released
// when they are sent. Beyond that, a side that does not read costs what its peer's buffers hold: the stack's send and
// receive buffers and the socket's, which the kernel tunes between tcp_rmem[1] and tcp_rmem[2] (near the first,
// unless the flow was fast before it stalled). SO_RCVBUF is not set: it would end the tuning, and a proxy 200 ms away
// needs its megabytes.
package relay
