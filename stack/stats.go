package stack

import (
	"sync/atomic"

	"github.com/viasocks/viasocks/stack/count"
)

// Counters is the table of what a stack counts: see package count.
type Counters[T any] struct {
	FramesIn  T `metric:"tun_frames_total" label:"direction=in" help:"Frames that crossed the TUN; in: from programs."`
	FramesOut T `metric:"tun_frames_total" label:"direction=out"`
	BytesIn   T `metric:"tun_bytes_total" label:"direction=in" help:"Bytes of the frames that crossed the TUN, with IP headers."`
	BytesOut  T `metric:"tun_bytes_total" label:"direction=out"`

	// ICMP other than an error about a flow; above all echo requests that no EchoHandler takes.
	DroppedICMP T `metric:"packets_dropped_total" label:"reason=icmp" help:"Packets that were dropped." lost:"ICMP (ping)"`
	// TCP to or from a multicast, broadcast, loopback or unspecified address.
	DroppedMulticast T `metric:"packets_dropped_total" label:"reason=multicast" lost:"multicast and broadcast"`
	// From a program: neither TCP, UDP nor ICMP; to a program: gVisor made something other than TCP.
	DroppedProto T `metric:"packets_dropped_total" label:"reason=protocol" lost:"other protocols than TCP and UDP"`
	// Not IP, or lengths or an offload header that cannot be.
	DroppedMalformed T `metric:"packets_dropped_total" label:"reason=malformed" lost:"malformed packets"`
	// A checksum that had to be verified is wrong.
	DroppedChecksum T `metric:"packets_dropped_total" label:"reason=checksum" lost:"wrong checksums"`
	// To a program: the device was full or refused the frame.
	DroppedOut T `metric:"packets_dropped_total" label:"reason=device_full" lost:"packets that the device did not take"`
	// Of HandedOver: the other shard was behind.
	DroppedHandover T `metric:"packets_dropped_total" label:"reason=handover" lost:"packets lost on the way to another shard"`
	HandedOver      T `metric:"shard_handovers_total" help:"Frames that came by the queue of another shard."`

	SYNs        T `metric:"tcp_syns_total" help:"Connections that programs asked for."`
	Retransmits T `metric:"tcp_syn_retransmits_total" help:"SYNs that came again for a pending or refused connection."`
	// SYNs forgotten unanswered.
	OverBudget     T `metric:"tcp_syns_dropped_total" label:"limit=pending" help:"SYNs over a limit." lost:"connections over --max-pending"`
	OverDestBudget T `metric:"tcp_syns_dropped_total" label:"limit=destination" lost:"connections over --max-pending-per-destination"`
	Replaced       T `metric:"tcp_pending_replaced_total" help:"Pending connections that a SYN with another sequence number replaced."`
	Cancelled      T `metric:"tcp_pending_cancelled_total" help:"Pending connections that their program gave up."`
	Accepted       T `metric:"tcp_accepted_total" help:"Connections that were granted to their program."`
	AcceptFailed   T `metric:"tcp_accept_failed_total" help:"Granted connections whose program was gone."`
	Refused        T `metric:"tcp_refused_total" help:"Connections that were refused to their program."`
	AppResets      T `metric:"tcp_resets_total" label:"by=program" help:"Open connections that were reset toward or by the program."`
	Aborted        T `metric:"tcp_resets_total" label:"by=viasocks"`
	// Segments of open streams that we sent again.
	TCPRetransmits T `metric:"tcp_retransmits_total" help:"Segments to programs that were sent again."`
}

// Stats is a snapshot of the stack's counters, taken without a lock: each figure is exact, but they are not of one
// instant.
type Stats struct {
	Counters[uint64]

	Pending int64 `metric:"tcp_pending" help:"Connections that wait for the answer of their upstream."`
	Streams int64 `metric:"tcp_open" help:"Open connections of programs."`

	UDP UDPStats
}

// counters is what Stats is taken from.
type counters struct {
	Counters[atomic.Uint64]
	pending, streams atomic.Int64
	udp              UDPCounters[atomic.Uint64]
}

// Stats returns a snapshot of the counters. Any goroutine.
func (s *Stack) Stats() Stats {
	var st Stats
	for _, p := range s.shards {
		p.addTo(&st)
	}
	return st
}

// addTo adds what the shard has counted.
func (s *shard) addTo(st *Stats) {
	c := &s.stats
	count.Add(&st.Counters, &c.Counters)
	count.Add(&st.UDP, &c.udp)
	st.Pending += c.pending.Load()
	st.Streams += c.streams.Load()
	if e := s.engine.Load(); e != nil {
		v := e.tally()
		st.DroppedMalformed += v.malformed
		st.DroppedChecksum += v.checksum
		st.TCPRetransmits += v.retransmits
	}
}
