package stack

import "sync/atomic"

// Stats is a snapshot of the stack's counters, taken without a lock: each value is exact, but they are not all from
// the same instant.
type Stats struct {
	FramesIn, BytesIn   uint64
	FramesOut, BytesOut uint64

	DroppedMalformed uint64 // frames in: not IP, impossible lengths or offload header
	DroppedChecksum  uint64 // frames in: a checksum that had to be verified is wrong
	DroppedICMP      uint64 // frames in: ICMP other than an error about a flow, mainly echo
	DroppedMulticast uint64 // frames in: TCP to or from a multicast, broadcast, loopback or unspecified address
	DroppedProto     uint64 // frames in: not TCP, UDP or ICMP; frames out of gVisor: not TCP
	DroppedOut       uint64 // frames out: the device was full or refused them

	SYNs           uint64 // streams requested
	Retransmits    uint64 // repeated SYNs for a pending or refused stream
	OverBudget     uint64 // SYNs forgotten without an answer, because of the total limit
	OverDestBudget uint64 // SYNs forgotten without an answer, because of the limit for one destination
	Replaced       uint64 // pending streams replaced by a SYN with another ISN
	Cancelled      uint64 // pending streams whose app gave up
	Accepted       uint64
	AcceptFailed   uint64 // streams accepted although the app was gone
	Refused        uint64
	AppResets      uint64 // open streams that the app reset
	Aborted        uint64 // open streams that we reset

	HandedOver      uint64 // frames that arrived on another shard's queue
	DroppedHandover uint64 // those of them that were lost because the shard could not keep up

	TCPRetransmits uint64 // segments of open streams that were sent again

	Pending int64 // SYNs that wait for an answer now
	Streams int64 // streams that are open now

	UDP UDPStats
}

// counters are the source of Stats.
type counters struct {
	framesIn, bytesIn   atomic.Uint64
	framesOut, bytesOut atomic.Uint64

	droppedMalformed, droppedChecksum, droppedICMP atomic.Uint64
	droppedMulticast, droppedProto, droppedOut     atomic.Uint64

	syns, retransmits, overBudget, overDestBudget atomic.Uint64
	replaced, cancelled                           atomic.Uint64
	accepted, acceptFailed, refused               atomic.Uint64
	appResets, aborted                            atomic.Uint64

	handedOver, droppedHandover atomic.Uint64

	pending, streams atomic.Int64

	udp udpCounters
}

// Stats returns a snapshot of the counters. It may be called from any goroutine.
func (s *Stack) Stats() Stats {
	var st Stats
	for _, p := range s.shards {
		p.addTo(&st)
	}
	return st
}

// addTo adds the shard's counters to st.
func (s *shard) addTo(st *Stats) {
	c := &s.stats

	st.FramesIn += c.framesIn.Load()
	st.BytesIn += c.bytesIn.Load()
	st.FramesOut += c.framesOut.Load()
	st.BytesOut += c.bytesOut.Load()
	st.DroppedMalformed += c.droppedMalformed.Load()
	st.DroppedChecksum += c.droppedChecksum.Load()
	st.DroppedICMP += c.droppedICMP.Load()
	st.DroppedMulticast += c.droppedMulticast.Load()
	st.DroppedProto += c.droppedProto.Load()
	st.DroppedOut += c.droppedOut.Load()
	st.SYNs += c.syns.Load()
	st.Retransmits += c.retransmits.Load()
	st.OverBudget += c.overBudget.Load()
	st.OverDestBudget += c.overDestBudget.Load()
	st.Replaced += c.replaced.Load()
	st.Cancelled += c.cancelled.Load()
	st.Accepted += c.accepted.Load()
	st.AcceptFailed += c.acceptFailed.Load()
	st.Refused += c.refused.Load()
	st.AppResets += c.appResets.Load()
	st.Aborted += c.aborted.Load()
	st.Pending += c.pending.Load()
	st.Streams += c.streams.Load()
	st.HandedOver += c.handedOver.Load()
	st.DroppedHandover += c.droppedHandover.Load()
	c.udp.addTo(&st.UDP)
	if e := s.engine.Load(); e != nil {
		v := e.verdicts()
		st.DroppedMalformed += v.malformed
		st.DroppedChecksum += v.checksum
		st.TCPRetransmits += v.retransmits
	}
}
