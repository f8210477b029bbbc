package stack

import (
	"encoding/binary"
	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// ICMP errors are built here and written raw instead of being sent by gVisor: its rate limiter (1000/s) would leave
// apps without an answer, and the source must be the quoted destination, which is not an address of gVisor.

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58

	ip4HeaderLen  = 20
	ip6HeaderLen  = 40
	udpHeaderLen  = 8
	icmpHeaderLen = 8 // type, code, checksum and 4 unused bytes (RFC 792; RFC 4443, section 3.1)

	// RFC 1812, section 4.3.2.3: as much of the datagram as fits into an error of 576 bytes.
	maxQuote4 = 576 - ip4HeaderLen - icmpHeaderLen
	// RFC 4443, section 2.4 (c): as much as fits the minimum IPv6 MTU.
	maxQuote6 = 1280 - ip6HeaderLen - icmpHeaderLen
	// The receiver finds the socket by the quoted ports; RFC 792 promises it 8 bytes.
	minQuote = 8

	icmpTTL = 64
	icmpTOS = 0xc0 // internetwork control (RFC 1812, section 4.3.2.5)
)

// unreachableCode returns the type and code for why in each family. For a datagram, RefuseReset is what RST is for
// TCP.
func unreachableCode(why flow.Refusal, v6 bool) (typ, code byte, ok bool) {
	typ = 3
	var c4, c6 byte
	switch why {
	case flow.RefuseReset, flow.RefusePort:
		c4, c6 = 3, 4
	case flow.RefuseNet:
		c4, c6 = 0, 0
	case flow.RefuseHost:
		c4, c6 = 1, 3
	case flow.RefuseAdmin:
		c4, c6 = 13, 1
	default: // RefuseSilent, RefuseLater and unknown values
		return 0, 0, false
	}
	if v6 {
		return 1, c6, true
	}
	return typ, c4, true
}

// appendUnreachable appends to b a whole IP packet with its checksums: the ICMP or ICMPv6 destination unreachable for
// why. It quotes quote, a packet of the app beginning with its IP header, as far as RFC 1812 and RFC 4443 allow. 8
// bytes after the IP header (and IPv6 extension headers) must be present, the rest may be missing. The source is that
// of errorSource.
//
// ok is false, and b is returned unchanged, if why is RefuseSilent, if quote cannot be a packet, or if RFC 1122,
// section 3.2.2, or RFC 4443, section 2.4 (e), forbids an answer: to ICMP errors, to fragments other than the first,
// to multicast and broadcast, and to a source that is not a single host.
func appendUnreachable(b []byte, quote []byte, why flow.Refusal) (out []byte, ok bool) {
	if len(quote) == 0 {
		return b, false
	}
	switch quote[0] >> 4 {
	case 4:
		return appendUnreachable4(b, quote, why)
	case 6:
		return appendUnreachable6(b, quote, why)
	}
	return b, false
}

func appendUnreachable4(b, quote []byte, why flow.Refusal) ([]byte, bool) {
	typ, code, ok := unreachableCode(why, false)
	if !ok || len(quote) < ip4HeaderLen {
		return b, false
	}
	ihl := int(quote[0]&0xf) * 4
	if ihl < ip4HeaderLen || len(quote) < ihl+minQuote {
		return b, false
	}
	if binary.BigEndian.Uint16(quote[6:])&0x1fff != 0 { // fragment offset
		return b, false
	}
	// Of ICMP, only the two queries that a host sends may be answered with an error (RFC 1122, sections 3.2.2.6 and
	// 3.2.2.8); all other messages are errors themselves, or answers.
	if quote[9] == protoICMP && quote[ihl] != 8 && quote[ihl] != 13 {
		return b, false
	}
	dst := netip.AddrFrom4([4]byte(quote[16:20]))
	if !flow.OneHost(netip.AddrFrom4([4]byte(quote[12:16]))) || !unicast(dst) {
		return b, false
	}
	from := errorSource(dst).As4()
	quote = quote[:min(len(quote), maxQuote4)]

	start := len(b)
	b = append(b, 0x45, icmpTOS, 0, 0, 0, 0, 0x40 /* DF: atomic, so the ID is free, RFC 6864 */, 0, icmpTTL, protoICMP, 0, 0)
	b = append(b, from[:]...)
	b = append(b, quote[12:16]...)
	b = append(b, typ, code, 0, 0, 0, 0, 0, 0)
	b = append(b, quote...)
	p := b[start:]
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ip4HeaderLen], 0))
	icmp := p[ip4HeaderLen:]
	binary.BigEndian.PutUint16(icmp[2:], ^checksum.Checksum(icmp, 0))
	return b, true
}

func appendUnreachable6(b, quote []byte, why flow.Refusal) ([]byte, bool) {
	typ, code, ok := unreachableCode(why, true)
	if !ok || len(quote) < ip6HeaderLen {
		return b, false
	}
	proto, off, first := skipExtensions(quote)
	if !first || off < 0 || len(quote) < off+minQuote {
		return b, false
	}
	// RFC 4443, section 2.1: errors have types below 128. Redirect is 137.
	if proto == protoICMPv6 && (quote[off] < 128 || quote[off] == 137) {
		return b, false
	}
	dst := netip.AddrFrom16([16]byte(quote[24:40]))
	if !flow.OneHost(netip.AddrFrom16([16]byte(quote[8:24]))) || !unicast(dst) {
		return b, false
	}
	from := errorSource(dst).As16()
	quote = quote[:min(len(quote), maxQuote6)]

	start := len(b)
	n := icmpHeaderLen + len(quote)
	b = append(b, 0x60, 0, 0, 0, byte(n>>8), byte(n), protoICMPv6, icmpTTL)
	b = append(b, from[:]...)
	b = append(b, quote[8:24]...)
	b = append(b, typ, code, 0, 0, 0, 0, 0, 0)
	b = append(b, quote...)
	p := b[start:]
	icmp := p[ip6HeaderLen:]
	sum := pseudoSum(p[8:40], protoICMPv6, n)
	binary.BigEndian.PutUint16(icmp[2:], ^checksum.Checksum(icmp, sum))
	return b, true
}

// errorSource returns the source address of an error about a packet to dst: dst itself, as if the far end had
// answered (Linux ignores an IPv4 error from one of its own addresses). An address that is not that of a single host
// cannot be the source of a packet (Linux before 5.3 drops packets from 0.0.0.0/8); in that case the far end of the
// TUN answers, as a router would.
func errorSource(dst netip.Addr) netip.Addr {
	switch {
	case flow.OneHost(dst):
		return dst
	case dst.Is4():
		return flow.Gateway4
	}
	return flow.Gateway6
}

// skipExtensions finds the upper layer of an IPv6 packet (RFC 8200, section 4.1): its protocol and its offset. off is
// -1 if the headers do not end within p. first is false in a fragment other than the first; off is then the beginning
// of the fragment's data.
func skipExtensions(p []byte) (proto byte, off int, first bool) {
	proto, off = p[6], ip6HeaderLen
	for {
		u, ok := walk6(p, proto, off)
		switch {
		case !ok:
			return u.proto, -1, true
		case u.later:
			return u.proto, u.off, false
		case !u.frag:
			return u.proto, u.off, true
		}
		proto, off = u.proto, u.off
	}
}

// pseudoSum returns the checksum of the pseudo-header. addrs contains source and destination, 8 or 32 bytes, as in
// the IP header; n is the length of what follows the IP header (RFC 768; RFC 8200, section 8.1).
func pseudoSum(addrs []byte, proto byte, n int) uint16 {
	sum := checksum.Checksum(addrs, uint16(proto))
	return checksum.Combine(sum, uint16(n)) // n < 65536: the upper half of the 32-bit length is zero
}

// parseUnreachable parses a port unreachable that the app's kernel sent about a datagram from remote to app. p is the
// IP packet and off the beginning of ICMP. The checksum is verified unless trusted is set.
func parseUnreachable(p []byte, off int, trusted bool) (app, remote netip.AddrPort, ok bool) {
	icmp := p[off:]
	if len(icmp) < icmpHeaderLen+ip4HeaderLen+udpHeaderLen {
		return app, remote, false
	}
	q := icmp[icmpHeaderLen:]
	var sum uint16
	var udp int
	var from, src, dst netip.Addr
	if p[0]>>4 == 4 {
		if icmp[0] != 3 || icmp[1] != 3 || q[0]>>4 != 4 || q[9] != protoUDP || binary.BigEndian.Uint16(q[6:])&0x1fff != 0 {
			return app, remote, false
		}
		udp = int(q[0]&0xf) * 4
		from = netip.AddrFrom4([4]byte(p[12:16]))
		src, dst = netip.AddrFrom4([4]byte(q[12:16])), netip.AddrFrom4([4]byte(q[16:20]))
		if udp < ip4HeaderLen {
			return app, remote, false
		}
	} else {
		if icmp[0] != 1 || icmp[1] != 4 || q[0]>>4 != 6 || len(q) < ip6HeaderLen || q[6] != protoUDP {
			return app, remote, false
		}
		udp = ip6HeaderLen
		from = netip.AddrFrom16([16]byte(p[8:24]))
		src, dst = netip.AddrFrom16([16]byte(q[8:24])), netip.AddrFrom16([16]byte(q[24:40]))
		sum = pseudoSum(p[8:40], protoICMPv6, len(icmp))
	}
	// Only the host that received the datagram can report that its port is closed.
	if len(q) < udp+udpHeaderLen || from != dst || !trusted && checksum.Checksum(icmp, sum) != 0xffff {
		return app, remote, false
	}
	remote = netip.AddrPortFrom(src, binary.BigEndian.Uint16(q[udp:]))
	app = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(q[udp+2:]))
	return app, remote, true
}
