package stacktest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// IP protocol numbers.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// Frame is one IP packet as it crossed the device, with its offload header.
type Frame struct {
	Header tun.Header
	Data   []byte
}

// ip removes the IP header. It does not handle fragments and extension headers.
func (f Frame) ip() (src, dst netip.Addr, proto byte, body []byte, ok bool) {
	p := f.Data
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		off, end := int(p[0]&0xf)*4, int(binary.BigEndian.Uint16(p[2:]))
		if off < 20 || end > len(p) || off > end {
			return src, dst, 0, nil, false
		}
		return netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:])), p[9], p[off:end], true
	case len(p) >= 40 && p[0]>>4 == 6:
		end := 40 + int(binary.BigEndian.Uint16(p[4:]))
		if end > len(p) {
			return src, dst, 0, nil, false
		}
		return netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:])), p[6], p[40:end], true
	}
	return src, dst, 0, nil, false
}

// TCP flags of Segment.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// Segment is a TCP segment.
type Segment struct {
	Src, Dst netip.AddrPort
	Flags    uint8
	Seq, Ack uint32
	Window   uint16
	Options  []byte // a multiple of 4 bytes
	Payload  []byte
}

// TCP parses the frame as a TCP segment; a super-segment is one segment.
func (f Frame) TCP() (s Segment, ok bool) {
	src, dst, proto, b, ok := f.ip()
	if !ok || proto != protoTCP || len(b) < 20 {
		return s, false
	}
	off := int(b[12]>>4) * 4
	if off < 20 || off > len(b) {
		return s, false
	}
	return Segment{
		Src:   netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)),
		Dst:   netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
		Flags: b[13] & 0x1f, Seq: binary.BigEndian.Uint32(b[4:]), Ack: binary.BigEndian.Uint32(b[8:]),
		Window: binary.BigEndian.Uint16(b[14:]), Options: b[20:off], Payload: b[off:],
	}, true
}

// Frame returns the whole IP packet with its checksums.
func (s Segment) Frame() Frame {
	b := make([]byte, 20, 20+len(s.Options)+len(s.Payload))
	binary.BigEndian.PutUint16(b, s.Src.Port())
	binary.BigEndian.PutUint16(b[2:], s.Dst.Port())
	binary.BigEndian.PutUint32(b[4:], s.Seq)
	binary.BigEndian.PutUint32(b[8:], s.Ack)
	b[12] = byte((20+len(s.Options))/4) << 4
	b[13] = s.Flags
	binary.BigEndian.PutUint16(b[14:], s.Window)
	b = append(append(b, s.Options...), s.Payload...)
	return newFrame(s.Src.Addr(), s.Dst.Addr(), protoTCP, b, 16)
}

// String returns one line for a failing test.
func (s Segment) String() string {
	flags := ""
	for i, c := range "FSRPA" {
		if s.Flags&(1<<i) != 0 {
			flags += string(c)
		}
	}
	return fmt.Sprintf("%v > %v %s seq %d ack %d win %d len %d", s.Src, s.Dst, flags, s.Seq, s.Ack, s.Window, len(s.Payload))
}

// Datagram is a UDP datagram, or several of the same size in a super-frame.
type Datagram struct {
	Src, Dst netip.AddrPort
	Payload  []byte
}

// UDP parses the frame as a UDP datagram; a super-frame is one datagram.
func (f Frame) UDP() (d Datagram, ok bool) {
	src, dst, proto, b, ok := f.ip()
	if !ok || proto != protoUDP || len(b) < 8 {
		return d, false
	}
	n := int(binary.BigEndian.Uint16(b[4:]))
	if n < 8 || n > len(b) {
		return d, false
	}
	return Datagram{
		Src: netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)), Dst: netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
		Payload: b[8:n],
	}, true
}

// Frame returns the whole IP packet with its checksums.
func (d Datagram) Frame() Frame {
	b := make([]byte, 8, 8+len(d.Payload))
	binary.BigEndian.PutUint16(b, d.Src.Port())
	binary.BigEndian.PutUint16(b[2:], d.Dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(d.Payload)))
	return newFrame(d.Src.Addr(), d.Dst.Addr(), protoUDP, append(b, d.Payload...), 6)
}

// SuperFrame returns the payload as a run of datagrams of size bytes each, as an app sends it with UDP_SEGMENT. The
// device must have USO.
func (d Datagram) SuperFrame(size int) Frame {
	f := d.Frame()
	off := len(f.Data) - 8 - len(d.Payload)
	f.Header = tun.Header{
		Flags: tun.NeedsCsum, GSOType: tun.GSOUDPL4, GSOSize: uint16(size), HdrLen: uint16(off + 8), CsumStart: uint16(off),
		CsumOffset: 6,
	}
	binary.BigEndian.PutUint16(f.Data[off+6:], pseudo(d.Src.Addr(), d.Dst.Addr(), protoUDP, 8+len(d.Payload)))
	return f
}

// ICMP is an ICMP or ICMPv6 message.
type ICMP struct {
	Src, Dst   netip.Addr
	Type, Code uint8
	Quote      []byte // the quoted packet, beginning with its IP header
}

// ICMP parses the frame as an ICMP or ICMPv6 message.
func (f Frame) ICMP() (m ICMP, ok bool) {
	src, dst, proto, b, ok := f.ip()
	if !ok || len(b) < 8 || proto != protoICMP && proto != protoICMPv6 {
		return m, false
	}
	return ICMP{Src: src, Dst: dst, Type: b[0], Code: b[1], Quote: b[8:]}, true
}

// Frame returns the whole IP packet with its checksums.
func (m ICMP) Frame() Frame {
	b := append([]byte{m.Type, m.Code, 0, 0, 0, 0, 0, 0}, m.Quote...)
	proto := byte(protoICMP)
	if m.Src.Is6() {
		proto = protoICMPv6
	}
	return newFrame(m.Src, m.Dst, proto, b, 2)
}

// quoted returns the flow that an ICMP error is about.
func (m ICMP) quoted() (proto byte, src, dst netip.AddrPort, ok bool) {
	q := m.Quote
	switch {
	case len(q) >= 28 && q[0]>>4 == 4 && int(q[0]&0xf)*4+8 <= len(q):
		b := q[int(q[0]&0xf)*4:]
		return q[9], netip.AddrPortFrom(netip.AddrFrom4([4]byte(q[12:])), binary.BigEndian.Uint16(b)),
			netip.AddrPortFrom(netip.AddrFrom4([4]byte(q[16:])), binary.BigEndian.Uint16(b[2:])), true
	case len(q) >= 48 && q[0]>>4 == 6:
		b := q[40:]
		return q[6], netip.AddrPortFrom(netip.AddrFrom16([16]byte(q[8:])), binary.BigEndian.Uint16(b)),
			netip.AddrPortFrom(netip.AddrFrom16([16]byte(q[24:])), binary.BigEndian.Uint16(b[2:])), true
	}
	return 0, src, dst, false
}

// newFrame adds an IP header to body and fills in the checksum at csum.
func newFrame(src, dst netip.Addr, proto byte, body []byte, csum int) Frame {
	var h []byte
	sum := uint16(0)
	if src.Is4() {
		h = make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(body)))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], ^checksum.Checksum(h, 0))
	} else {
		h = make([]byte, 40)
		h[0], h[6], h[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(h[4:], uint16(len(body)))
		copy(h[8:], src.AsSlice())
		copy(h[24:], dst.AsSlice())
	}
	if proto != protoICMP {
		sum = pseudo(src, dst, proto, len(body))
	}
	v := ^checksum.Checksum(body, sum)
	if v == 0 && proto == protoUDP {
		v = 0xffff
	}
	binary.BigEndian.PutUint16(body[csum:], v)
	return Frame{Data: append(h, body...)}
}

func pseudo(src, dst netip.Addr, proto byte, n int) uint16 {
	return checksum.Checksum(append(append(src.AsSlice(), dst.AsSlice()...), 0, proto, byte(n>>8), byte(n)), 0)
}

// Fragments splits f as a sender with this MTU does: in order, and with the same id in all fragments. A frame that
// fits is returned whole.
func (f Frame) Fragments(mtu int, id uint32) []Frame {
	p := f.Data
	if len(p) <= mtu {
		return []Frame{f}
	}
	var out []Frame
	h, step := 20, (mtu-20)&^7
	if p[0]>>4 == 6 {
		h, step = 40, (mtu-48)&^7
	}
	body := p[h:]
	for at := 0; at < len(body); at += step {
		part, more := body[at:min(at+step, len(body))], at+step < len(body)
		if at+len(part) == len(body) {
			more = false
		}
		q := append([]byte{}, p[:h]...)
		if h == 20 {
			flags := uint16(at / 8)
			if more {
				flags |= 0x2000
			}
			binary.BigEndian.PutUint16(q[4:], uint16(id))
			binary.BigEndian.PutUint16(q[6:], flags)
			binary.BigEndian.PutUint16(q[2:], uint16(h+len(part)))
			q[10], q[11] = 0, 0
			binary.BigEndian.PutUint16(q[10:], ^checksum.Checksum(q, 0))
		} else {
			off := uint16(at)
			if more {
				off |= 1
			}
			q = append(q, q[6], 0, 0, 0, 0, 0, 0, 0)
			q[6] = 44
			binary.BigEndian.PutUint16(q[42:], off)
			binary.BigEndian.PutUint32(q[44:], id)
			binary.BigEndian.PutUint16(q[4:], uint16(8+len(part)))
		}
		out = append(out, Frame{Data: append(q, part...)})
	}
	return out
}
