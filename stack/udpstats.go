package stack

// UDPCounters is the table of what is counted of datagrams: see package count. "In" is from the app, "out" is to the app.
type UDPCounters[T any] struct {
	In       T `metric:"udp_datagrams_total" label:"direction=in" help:"Datagrams of programs; in: from them."`
	Out      T `metric:"udp_datagrams_total" label:"direction=out"`
	InBytes  T `metric:"udp_bytes_total" label:"direction=in" help:"Payload of the datagrams of programs."`
	OutBytes T `metric:"udp_bytes_total" label:"direction=out"`
	// Super-frames that the datagrams came and went in.
	InSuper  T `metric:"udp_super_frames_total" label:"direction=in" help:"Frames that carried several datagrams."`
	OutSuper T `metric:"udp_super_frames_total" label:"direction=out"`
	// Of In: put together from fragments.
	InReassembled T `metric:"udp_reassembled_total" help:"Datagrams of programs that were put together from fragments."`

	// Impossible lengths, port zero, a super-frame that makes no sense.
	DroppedMalformed T `metric:"datagrams_dropped_total" label:"reason=malformed" help:"Datagrams that were dropped." lost:"malformed packets"`
	// Checksum wrong, or missing over IPv6.
	DroppedChecksum T `metric:"datagrams_dropped_total" label:"reason=checksum" lost:"wrong checksums"`
	// To a multicast or broadcast address: never relayed.
	DroppedMulticast T `metric:"datagrams_dropped_total" label:"reason=multicast" lost:"multicast and broadcast"`
	// Source or destination that no proxy can speak for: unspecified, loopback, link-local over IPv6.
	DroppedAddress T `metric:"datagrams_dropped_total" label:"reason=address" lost:"datagrams of addresses that no proxy can carry"`
	// To a program: longer than IP can say.
	OutTooLong T `metric:"datagrams_dropped_total" label:"reason=reply_too_long" lost:"datagrams to programs that IP cannot carry"`
	// To a program: source and destination not of one family, or not set.
	OutAddress T `metric:"datagrams_dropped_total" label:"reason=reply_address" lost:"datagrams to programs that IP cannot carry"`
	// To a program: the device was full or refused the frame.
	OutFull T `metric:"datagrams_dropped_total" label:"reason=device_full" lost:"packets that the device did not take"`

	Refused T `metric:"icmp_errors_total" label:"outcome=sent" help:"Datagrams that were to be answered with an ICMP error."`
	// Nothing to quote, an answer is forbidden, or the device was full.
	RefusedMute T `metric:"icmp_errors_total" label:"outcome=not_sent"`
	Unreachable T `metric:"icmp_unreachable_received_total" help:"Datagrams to programs that their kernel had no socket for."`
}

// UDPStats is the datagram part of Stats.
type UDPStats = UDPCounters[uint64]
