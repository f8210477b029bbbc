// Package capture writes what crosses the TUN as pcapng (draft-ietf-opsawg-pcapng), for `viasocks capture`.
//
//	Writer     blocks of pcapng: packets with comments, and the statistics at the end
//	Recording  what is captured: a queue that the data plane fills, the filter, and what is known of the flows
//
// The data plane only copies a packet into the queue, and drops it when the queue is full. Everything else is done by
// the goroutine that writes. It delays each packet for a moment, so that the comment can contain what is known about
// the flow by then.
//
// The blocks are written here and not by gopacket: its writer needs its package layers, which would cost every viasocks
// 0.5 MB of memory at the start, while three types of blocks take less than a hundred lines.
package capture
