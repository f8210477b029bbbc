package flow

import (
	"errors"
	"net/netip"
	"time"
)

// Proto is an IP protocol number of the IANA registry.
type Proto uint8

// The two protocols that a SOCKS proxy can carry.
const (
	TCP Proto = 6
	UDP Proto = 17
)

// String returns the word used in logs: tcp or udp.
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return "proto?"
}

// Flow is one captured TCP connection, or the UDP traffic from one app endpoint to one destination.
type Flow struct {
	ID    uint64 // assigned by route's flow table; zero until then
	Proto Proto
	Src   netip.AddrPort // the app's endpoint
	Dst   netip.AddrPort // the destination that the app asked for
	Start time.Time      // when the first packet was seen
}

// Refusal tells how a flow is refused, in terms of what the app's kernel receives.
type Refusal uint8

const (
	RefuseReset  Refusal = iota // TCP RST: ECONNREFUSED
	RefuseNet                   // ICMP 3/0, ICMPv6 1/0: ENETUNREACH
	RefuseHost                  // ICMP 3/1, ICMPv6 1/3: EHOSTUNREACH
	RefuseAdmin                 // ICMP 3/13, ICMPv6 1/1: EHOSTUNREACH, EACCES
	RefusePort                  // ICMP 3/3, ICMPv6 1/4: ECONNREFUSED; for UDP
	RefuseSilent                // nothing: the app's own timer decides
	RefuseLater                 // nothing, and the SYN is forgotten; a retransmission is a new attempt
)

var refusalNames = [...]string{
	"reset",
	"net-unreachable",
	"host-unreachable",
	"admin-prohibited",
	"port-unreachable",
	"silent",
	"later",
}

func (r Refusal) String() string {
	if int(r) < len(refusalNames) {
		return refusalNames[r]
	}
	return "refusal?"
}

// Sockets tells whether the app still has a socket. Implementations may be called concurrently and answer within
// microseconds (one netlink exchange). They may be called from an event loop, but not for each packet.
type Sockets interface {
	// Exists reports whether there is a socket of the IP protocol proto with the local endpoint src. For TCP it is
	// the socket with exactly this source and destination, in any state that can still take an answer, including
	// SYN_SENT. For UDP, dst may be the zero AddrPort. An error means that the query failed, not that the socket is
	// gone. ErrForwarded means that the socket was not found, but may be that of a guest.
	Exists(proto Proto, src, dst netip.AddrPort) (bool, error)
	// BoundUDP calls visit with the local endpoint of each UDP socket, in a single query. The address is unspecified,
	// of either family, if a socket is bound to all addresses.
	BoundUDP(visit func(local netip.AddrPort)) error
	// Forwards reports whether Exists may answer ErrForwarded.
	Forwards() bool
}

// ErrForwarded is returned for a socket that was not found on a host which forwards for others (virtual machines,
// containers) and may translate their addresses to its own. If the same socket was found before, it is gone now;
// otherwise nothing is known.
var ErrForwarded = errors.New("not found, and it may be the socket of a guest")
