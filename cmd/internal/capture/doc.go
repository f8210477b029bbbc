// Package capture writes what crosses the TUN as pcapng (draft-ietf-opsawg-pcapng), for `viasocks capture`.
//
//	Writer   blocks of pcapng: packets with comments, and the statistics at the end
//	Session  what is captured: a queue that the data plane fills, the filter, and what is known of the flows
//
// The data plane only copies a packet into the queue, and drops it when the queue is full. Everything else is done by the goroutine
// that writes. It lets a packet wait for a moment, so that what is known of its flow by then stands beside it.
//
// The blocks are written here and not by gopacket: importing its package layers, which its writer needs, costs every viasocks 0.5 MB
// of memory at the start, and three kinds of blocks take less than a hundred lines.
package capture
