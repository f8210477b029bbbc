package stack

import "sync/atomic"

// UDPStats is the datagram part of Stats. "In" means from the app, "out" to the app.
type UDPStats struct {
	In, InBytes   uint64 // datagrams passed to the Handler, and their payload bytes
	InSuper       uint64 // super-frames that contained them, where the kernel made any
	InReassembled uint64 // those of In that were reassembled from fragments

	DroppedMalformed uint64 // impossible lengths, port zero, or an inconsistent super-frame
	DroppedChecksum  uint64 // checksum wrong, or missing over IPv6
	DroppedMulticast uint64 // to a multicast or broadcast address: never relayed
	DroppedAddress   uint64 // source or destination that no proxy can reach: unspecified, loopback, IPv6 link-local

	Out, OutBytes uint64 // datagrams written to the app, and their payload bytes
	OutSuper      uint64 // super-frames that contained them
	OutTooLong    uint64 // not written: too long for IP
	OutAddress    uint64 // not written: source and destination of different families, or not set
	OutFull       uint64 // lost: the device was full or refused the frame

	Refused     uint64 // ICMP errors written to the app
	RefusedMute uint64 // no ICMP error was written: nothing to quote, an answer is forbidden, or the device was full
	Unreachable uint64 // ICMP port unreachable from the app's kernel about a datagram of ours
}

// udpCounters are the source of UDPStats.
type udpCounters struct {
	in, inBytes, inSuper, inReassembled                                 atomic.Uint64
	droppedMalformed, droppedChecksum, droppedMulticast, droppedAddress atomic.Uint64
	out, outBytes, outSuper, outTooLong, outAddress, outFull            atomic.Uint64
	refused, refusedMute, unreachable                                   atomic.Uint64
}

func (c *udpCounters) addTo(st *UDPStats) {
	st.In += c.in.Load()
	st.InBytes += c.inBytes.Load()
	st.InSuper += c.inSuper.Load()
	st.InReassembled += c.inReassembled.Load()
	st.DroppedMalformed += c.droppedMalformed.Load()
	st.DroppedChecksum += c.droppedChecksum.Load()
	st.DroppedMulticast += c.droppedMulticast.Load()
	st.DroppedAddress += c.droppedAddress.Load()
	st.Out += c.out.Load()
	st.OutBytes += c.outBytes.Load()
	st.OutSuper += c.outSuper.Load()
	st.OutTooLong += c.outTooLong.Load()
	st.OutAddress += c.outAddress.Load()
	st.OutFull += c.outFull.Load()
	st.Refused += c.refused.Load()
	st.RefusedMute += c.refusedMute.Load()
	st.Unreachable += c.unreachable.Load()
}
