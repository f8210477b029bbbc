package stack

import "encoding/binary"

// IP headers are parsed only here, once for each frame.

// packet is the content of a frame's IP header and the extension headers after it. The bytes stay in the frame.
type packet struct {
	v6 bool
	// upper describes what follows the IP header and its options or extension headers. In a fragment, that is the
	// fragment's data.
	upper
	end int // end of the packet; the frame may be longer
}

// upper tells where the headers of the network layer end.
type upper struct {
	proto  byte // IP protocol or next header number
	off    int  // offset at which it begins
	frag   bool // the packet is a fragment, even if it is the only one
	later  bool // a fragment other than the first: there is no header at off
	id     uint16
	routed bool // another destination follows (a routing header with segments left)
}

// parseIP parses the IP header of a frame of any content. ok is false if the lengths are impossible for an IP packet.
func parseIP(b []byte) (p packet, ok bool) {
	if len(b) < ip4HeaderLen {
		return p, false
	}
	switch b[0] >> 4 {
	case 4:
		p.off, p.end = int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
		if p.off < ip4HeaderLen || p.end < p.off || p.end > len(b) {
			return p, false
		}
		p.proto = b[9]
		if f := binary.BigEndian.Uint16(b[6:]) & 0x3fff; f != 0 { // more fragments, or an offset
			p.frag, p.later, p.id = true, f&0x1fff != 0, binary.BigEndian.Uint16(b[4:])
		}
		return p, true
	case 6:
		p.v6 = true
		if len(b) < ip6HeaderLen {
			return p, false
		}
		if p.end = ip6HeaderLen + int(binary.BigEndian.Uint16(b[4:])); p.end > len(b) {
			return p, false
		}
		p.upper, ok = walk6(b[:p.end], b[6], ip6HeaderLen)
		return p, ok
	}
	return p, false
}

// plainEnd returns the end of the packet if it is a TCP segment without IP options or extension headers, and 0
// otherwise. hdr is the result of inspect.
func (p *packet) plainEnd(hdr int) int {
	if hdr == 0 || p.off != p.ipLen() {
		return 0
	}
	return p.end
}

// ipLen returns the length of an IP header without options.
func (p *packet) ipLen() int {
	if p.v6 {
		return ip6HeaderLen
	}
	return ip4HeaderLen
}

// walk6 skips the extension headers of an IPv6 packet (RFC 8200, section 4), beginning with the one of type next at
// off. It ends at a fragment header, which is followed by a header only in the first fragment. ok is false if the
// headers do not end within p.
func walk6(p []byte, next byte, off int) (u upper, ok bool) {
	u.proto, u.off = next, off
	for {
		n := 8
		switch u.proto {
		case protoHopByHop, protoRouting, protoDestOpts, protoFragment:
			if len(p) < u.off+n {
				return u, false
			}
		default:
			return u, u.off <= len(p)
		}
		h := p[u.off:]
		switch u.proto {
		case protoFragment:
			u.frag, u.later, u.id = true, binary.BigEndian.Uint16(h[2:])&^7 != 0, binary.BigEndian.Uint16(h[6:])
		case protoRouting:
			u.routed = u.routed || h[3] != 0
			fallthrough
		default:
			n += 8 * int(h[1])
		}
		if u.proto, u.off = h[0], u.off+n; u.off > len(p) {
			return u, false
		}
		if u.frag {
			return u, true
		}
	}
}

// appPort returns the app's port for a packet from the app: the source port of TCP and UDP, or, for an ICMP error,
// the destination port of the packet that it quotes, which we had sent. ok is false if the packet does not contain
// it.
func appPort(b []byte, p *packet) (port uint16, ok bool) {
	u := b[p.off:p.end]
	at := 0
	switch {
	case p.frag:
		return 0, false
	case p.proto == protoTCP || p.proto == protoUDP:
	case p.proto == protoICMP && !p.v6 && len(u) >= icmpHeaderLen+ip4HeaderLen:
		u = u[icmpHeaderLen:]
		at = int(u[0]&0xf)*4 + 2
	case p.proto == protoICMPv6 && p.v6 && len(u) >= icmpHeaderLen+ip6HeaderLen:
		u = u[icmpHeaderLen:]
		at = ip6HeaderLen + 2
	default:
		return 0, false
	}
	if len(u) < at+2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(u[at:]), true
}
