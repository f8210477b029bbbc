package tun

import (
	"encoding/binary"
	"net/netip"
)

const (
	protoTCP = 6
	protoUDP = 17

	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagPSH = 0x08
	flagACK = 0x10
)

// packet is an IPv4 or IPv6 packet without options, as the tests write and read it.
type packet struct {
	src, dst netip.AddrPort
	proto    byte
	seq, ack uint32
	flags    byte
	mss      uint16 // option of a SYN, with window scale 7
	payload  []byte
}

func sum16(b []byte, s uint32) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// marshal builds the packet. partial leaves the pseudo header's sum in the checksum, as NeedsCsum asks.
func (p packet) marshal(partial bool) (frame []byte, l3, l4 int) {
	var tp []byte
	csumOff := 0
	switch p.proto {
	case protoUDP:
		tp = make([]byte, 8)
		binary.BigEndian.PutUint16(tp[4:], uint16(8+len(p.payload)))
		csumOff = 6
	case protoTCP:
		tp = make([]byte, 20)
		if p.mss != 0 {
			tp = append(tp, 2, 4, byte(p.mss>>8), byte(p.mss), 3, 3, 7, 1)
		}
		binary.BigEndian.PutUint32(tp[4:], p.seq)
		binary.BigEndian.PutUint32(tp[8:], p.ack)
		tp[12] = byte(len(tp)/4) << 4
		tp[13] = p.flags
		binary.BigEndian.PutUint16(tp[14:], 65535)
		csumOff = 16
	}
	binary.BigEndian.PutUint16(tp, p.src.Port())
	binary.BigEndian.PutUint16(tp[2:], p.dst.Port())
	l4 = len(tp)
	n := l4 + len(p.payload)
	s := sum16(p.src.Addr().AsSlice(), uint32(p.proto)+uint32(n))
	s = sum16(p.dst.Addr().AsSlice(), s)
	if partial {
		binary.BigEndian.PutUint16(tp[csumOff:], fold(s))
	} else {
		binary.BigEndian.PutUint16(tp[csumOff:], ^fold(sum16(p.payload, sum16(tp, s))))
	}
	var ip []byte
	if p.src.Addr().Is4() {
		ip = make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, p.proto
		binary.BigEndian.PutUint16(ip[2:], uint16(20+n))
		copy(ip[12:], p.src.Addr().AsSlice())
		copy(ip[16:], p.dst.Addr().AsSlice())
		binary.BigEndian.PutUint16(ip[10:], ^fold(sum16(ip, 0)))
	} else {
		ip = make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, p.proto, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(n))
		copy(ip[8:], p.src.Addr().AsSlice())
		copy(ip[24:], p.dst.Addr().AsSlice())
	}
	l3 = len(ip)
	return append(append(ip, tp...), p.payload...), l3, l4
}

// parse is the inverse; ok is false for what the tests did not send.
func parse(b []byte) (p packet, ok bool) {
	var src, dst netip.Addr
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		p.proto, b = b[9], b[int(b[0]&15)*4:]
	case len(b) >= 40 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		p.proto, b = b[6], b[40:]
	default:
		return p, false
	}
	if len(b) < 8 {
		return p, false
	}
	p.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b))
	p.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:]))
	switch {
	case p.proto == protoUDP:
		p.payload = b[8:]
	case p.proto == protoTCP && len(b) >= 20:
		p.seq, p.ack = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
		p.flags = b[13]
		p.payload = b[int(b[12]>>4)*4:]
	default:
		return p, false
	}
	return p, true
}

func ap(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
