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

// String is the word used in logs: tcp, udp.
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
	ID    uint64 // given by route's flow table; zero until then
	Proto Proto
	Src   netip.AddrPort // the app's endpoint
	Dst   netip.AddrPort // where the app wants to go
	Start time.Time      // when the first packet was seen
}

// Refusal is how a flow is refused, named by what the app's kernel is sent.
type Refusal uint8

const (
	RefuseReset  Refusal = iota // TCP RST: ECONNREFUSED
	RefuseNet                   // ICMP 3/0, ICMPv6 1/0: ENETUNREACH
	RefuseHost                  // ICMP 3/1, ICMPv6 1/3: EHOSTUNREACH
	RefuseAdmin                 // ICMP 3/13, ICMPv6 1/1: EHOSTUNREACH, EACCES
	RefusePort                  // ICMP 3/3, ICMPv6 1/4: ECONNREFUSED; for UDP
	RefuseSilent                // nothing: the app's own timer decides
	RefuseLater                 // nothing, and the SYN is forgotten: when it comes again it is a new try
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

// Sockets answers whether the app still has a socket. Implementations are safe for concurrent use and answer within
// microseconds (one netlink exchange), so they may be asked from an event loop but not for each packet.
type Sockets interface {
	// Exists reports whether a socket of the IP protocol proto is there with the local endpoint src. For TCP it is the
	// socket with exactly this source and destination, in any state that can still take an answer (SYN_SENT
	// included). For UDP dst may be the zero AddrPort. An error means that it can't be asked, not that it is gone;
	// ErrForwarded, that the answer is no unless the socket is a guest's.
	Exists(proto Proto, src, dst netip.AddrPort) (bool, error)
	// BoundUDP calls visit with the local endpoint of each UDP socket: one question for all of them. The address is
	// unspecified, of either family, where a socket is bound to every address.
	BoundUDP(visit func(local netip.AddrPort)) error
	// Forwards reports whether Exists may answer ErrForwarded.
	Forwards() bool
}

// ErrForwarded is the answer about a socket that was not found on a host which forwards for others (virtual machines,
// containers), whose addresses it may translate to its own. If the same socket was found before, it is gone now; if not,
// nothing is known.
var ErrForwarded = errors.New("not found, and it may be the socket of a guest")
