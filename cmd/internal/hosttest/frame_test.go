package hosttest

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// packet is what the recorder knows of a frame.
type packet struct {
	etherType    uint16
	proto        uint8 // behind IPv6's extension headers
	src, dst     netip.Addr
	sport, dport uint16 // of UDP and TCP, not of later fragments
	icmp         uint8  // type
	hops         uint8
	first, later bool   // the first fragment, one that is not
	id           uint32 // of a fragment's datagram
	flags        uint8
	bad          bool // too short for what it says
	length       int
}

func (p packet) String() string {
	switch {
	case !p.src.IsValid():
		return fmt.Sprintf("ethertype %#04x, %d bytes", p.etherType, p.length)
	case p.proto == unix.IPPROTO_ICMP, p.proto == unix.IPPROTO_ICMPV6:
		return fmt.Sprintf("%v > %v icmp type %d, hop limit %d, %d bytes", p.src, p.dst, p.icmp, p.hops, p.length)
	case p.proto == unix.IPPROTO_TCP:
		return fmt.Sprintf(
			"%v > %v tcp flags %#02x, %d bytes",
			netip.AddrPortFrom(p.src, p.sport),
			netip.AddrPortFrom(p.dst, p.dport),
			p.flags,
			p.length,
		)
	}
	return fmt.Sprintf(
		"%v > %v proto %d later %v, %d bytes",
		netip.AddrPortFrom(p.src, p.sport),
		netip.AddrPortFrom(p.dst, p.dport),
		p.proto,
		p.later,
		p.length,
	)
}

func (p *packet) cut(later, more bool, id uint32) {
	p.later, p.first = later, !later && more
	if later || more {
		p.id = id
	}
}

// parse reads an Ethernet frame.
func parse(f []byte) (p packet) {
	p.length = len(f)
	if len(f) < 14 {
		p.bad = true
		return p
	}
	p.etherType = binary.BigEndian.Uint16(f[12:])
	b := f[14:]
	switch p.etherType {
	case unix.ETH_P_IP:
		if len(b) < 20 || int(b[0]&15)*4 < 20 || len(b) < int(b[0]&15)*4 {
			p.bad = true
			return p
		}
		p.proto, p.hops = b[9], b[8]
		p.src, p.dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		p.cut(binary.BigEndian.Uint16(b[6:])&0x1fff != 0, b[6]&0x20 != 0, uint32(binary.BigEndian.Uint16(b[4:])))
		b = b[b[0]&15*4:]
	case unix.ETH_P_IPV6:
		if len(b) < 40 {
			p.bad = true
			return p
		}
		p.proto, p.hops = b[6], b[7]
		p.src, p.dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[40:]
		for p.proto == unix.IPPROTO_HOPOPTS || p.proto == unix.IPPROTO_ROUTING || p.proto == unix.IPPROTO_DSTOPTS ||
			p.proto == unix.IPPROTO_FRAGMENT {
			n := 8
			if len(b) >= 2 && p.proto != unix.IPPROTO_FRAGMENT {
				n += int(b[1]) * 8
			}
			if len(b) < n {
				p.bad = true
				return p
			}
			if p.proto == unix.IPPROTO_FRAGMENT {
				p.cut(b[2] != 0 || b[3]&^7 != 0, b[3]&1 != 0, binary.BigEndian.Uint32(b[4:]))
			}
			p.proto, b = b[0], b[n:]
			if p.later {
				break
			}
		}
	default:
		return p
	}
	switch {
	case p.later:
	case p.proto == unix.IPPROTO_TCP && len(b) >= 20:
		p.flags = b[13]
		fallthrough
	case p.proto == unix.IPPROTO_UDP && len(b) >= 8:
		p.sport, p.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	case (p.proto == unix.IPPROTO_ICMP || p.proto == unix.IPPROTO_ICMPV6) && len(b) >= 4:
		p.icmp = b[0]
	case p.proto == unix.IPPROTO_TCP || p.proto == unix.IPPROTO_UDP || p.proto == unix.IPPROTO_ICMP ||
		p.proto == unix.IPPROTO_ICMPV6:
		p.bad = true
	}
	return p
}

// dhcpServers are where a DHCP client of the host sends to.
var dhcpServers = []netip.Prefix{
	netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("169.254.0.0/16"), // and the connected networks
	netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("ff02::1:2/128"), netip.MustParsePrefix("fe80::/10"),
}

// harmless says by which exception a frame may leave the host beside what goes to the proxy; empty: by none. These are
// the exceptions of the manual.
func harmless(p packet) string {
	switch {
	case p.bad || p.later:
	case p.etherType == unix.ETH_P_ARP:
		return "arp"
	case p.etherType == unix.ETH_P_IPV6 && p.proto == unix.IPPROTO_ICMPV6:
		switch p.icmp {
		case 133, 135, 136:
			if p.hops == 255 {
				return "neighbour discovery"
			}
		case 131, 132, 143:
			if p.hops == 1 {
				return "multicast listener report"
			}
		}
	case p.etherType == unix.ETH_P_IP && p.proto == unix.IPPROTO_UDP && p.sport == 68 && p.dport == 67,
		p.etherType == unix.ETH_P_IPV6 && p.proto == unix.IPPROTO_UDP && p.sport == 546 && p.dport == 547:
		if slices.ContainsFunc(dhcpServers, func(n netip.Prefix) bool { return n.Contains(p.dst) }) {
			return "dhcp"
		}
	}
	return ""
}

func TestFrames(t *testing.T) {
	eth := func(typ uint16, b []byte) []byte {
		return append(binary.BigEndian.AppendUint16(make([]byte, 12), typ), b...)
	}
	v4to := func(a, b, c, d, proto byte, body ...byte) []byte {
		return eth(unix.ETH_P_IP, append([]byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0, 10, 0, 0, 1, a, b, c, d}, body...))
	}
	v4 := func(proto byte, body ...byte) []byte { return v4to(10, 77, 0, 1, proto, body...) }
	v6 := func(next, hops byte, body ...byte) []byte {
		h := make([]byte, 40)
		h[0], h[6], h[7] = 0x60, next, hops
		return eth(unix.ETH_P_IPV6, append(h, body...))
	}
	to6 := func(dst string, frame []byte) []byte {
		copy(frame[14+24:], netip.MustParseAddr(dst).AsSlice())
		return frame
	}
	ports := func(a, b uint16, n int) []byte {
		return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, a), b), make([]byte, n)...)
	}
	for _, tt := range []struct {
		name, want string
		frame      []byte
	}{
		{"short", "", []byte{1, 2, 3}},
		{"arp", "arp", eth(unix.ETH_P_ARP, make([]byte, 28))},
		{"another type", "", eth(0x88cc, make([]byte, 28))},
		{"neighbour solicitation", "neighbour discovery", v6(58, 255, 135, 0, 0, 0)},
		{"from afar", "", v6(58, 64, 135, 0, 0, 0)},
		{"router advertisement", "", v6(58, 255, 134, 0, 0, 0)},
		{"echo", "", v6(58, 255, 128, 0, 0, 0)},
		{"report behind router alert", "multicast listener report", v6(0, 1, 58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0)},
		{"report with a larger hop limit", "", v6(0, 2, 58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0)},
		{"icmp 135 of IPv4", "", v4(1, 135, 0, 0, 0)},
		{"dhcp", "dhcp", v4(17, ports(68, 67, 4)...)},
		{"dhcp by broadcast", "dhcp", v4to(255, 255, 255, 255, 17, ports(68, 67, 4)...)},
		{"dhcp to anybody", "", v4to(203, 0, 113, 9, 17, ports(68, 67, 4)...)},
		{"dhcp of a server", "", v4(17, ports(67, 68, 4)...)},
		{"its ports by tcp", "", v4(6, ports(68, 67, 20)...)},
		{"dhcpv6", "dhcp", to6("ff02::1:2", v6(17, 64, ports(546, 547, 4)...))},
		{"dhcpv6 to anybody", "", v6(17, 64, ports(546, 547, 4)...)},
		{"cut extension header", "", v6(0, 1, 58, 9)},
		{"later fragment", "", v6(44, 255, 58, 0, 0, 16, 0, 0, 0, 1, 135, 0, 0, 0)},
		{"udp", "", v4(17, ports(5000, 53, 4)...)},
	} {
		if got := harmless(parse(tt.frame)); got != tt.want {
			t.Errorf("%s: %q, want %q (%v)", tt.name, got, tt.want, parse(tt.frame))
		}
	}
}
