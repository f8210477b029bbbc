package capture

import (
	"encoding/binary"
	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
)

// tuple identifies the flow of a packet by the endpoints as the program sees them. The flow of a datagram is a mapping,
// which is identified by its source alone.
type tuple struct {
	proto    flow.Proto
	src, dst netip.AddrPort
}

// flow returns the tuple that identifies the flow.
func (t tuple) flow() tuple {
	if t.proto == flow.UDP {
		t.dst = netip.AddrPort{}
	}
	return t
}

// Protocol numbers and header lengths.
const (
	protoICMP, protoTCP, protoUDP, protoICMP6 = 1, 6, 17, 58
	ip4Len, ip6Len, icmpLen                   = 20, 40, 8
)

// tupleOf returns the endpoints of a packet. For an ICMP error, they are those of the quoted packet. ok is false for
// other protocols, for fragments other than the first, and for packets with IPv6 extension headers.
func tupleOf(b []byte, toApp bool) (t tuple, ok bool) {
	proto, src, dst, rest, ok := parseIP(b)
	if !ok {
		return t, false
	}
	switch {
	case proto == protoTCP && len(rest) >= 4:
		t.proto = flow.TCP
	case proto == protoUDP && len(rest) >= 4:
		t.proto = flow.UDP
	case (proto == protoICMP && len(rest) > icmpLen && rest[0] == 3 || proto == protoICMP6 && len(rest) > icmpLen &&
		rest[0] < 128):
		quoted := rest[icmpLen:]
		if p, _, _, _, ok := parseIP(quoted); !ok || p == protoICMP || p == protoICMP6 {
			return t, false
		}
		return tupleOf(quoted, !toApp)
	default:
		return t, false
	}
	t.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(rest))
	t.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(rest[2:]))
	if toApp {
		t.src, t.dst = t.dst, t.src
	}
	return t, true
}

func parseIP(b []byte) (proto byte, src, dst netip.Addr, rest []byte, ok bool) {
	switch {
	case len(b) >= ip4Len && b[0]>>4 == 4:
		n := int(b[0]&0xf) * 4
		if n < ip4Len || len(b) < n || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return 0, src, dst, nil, false
		}
		return b[9], netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[n:], true
	case len(b) >= ip6Len && b[0]>>4 == 6:
		return b[6], netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[ip6Len:], true
	}
	return 0, src, dst, nil, false
}
