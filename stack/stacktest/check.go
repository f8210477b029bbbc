package stacktest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// receive does what a kernel does with a frame that is written to its TUN: it fills in the checksum that the header
// requests, splits a UDP super-frame, and verifies everything. It returns whole packets with correct checksums; a TCP
// super-segment stays one packet. It changes Data in place.
func receive(f Frame) ([]Frame, error) {
	src, dst, proto, body, ok := f.ip()
	if !ok {
		return nil, errors.New("not an IP packet, or impossible lengths")
	}
	off := len(f.Data) - len(body)
	v4 := f.Data[0]>>4 == 4
	if v4 && checksum.Checksum(f.Data[:off], 0) != 0xffff {
		return nil, errors.New("wrong IPv4 header checksum")
	}
	if v4 && binary.BigEndian.Uint16(f.Data[6:])&0x3fff != 0 || !v4 && proto == 44 {
		return []Frame{f}, nil // verified when it is whole
	}
	least, at := shape(proto)
	if least == 0 {
		return nil, fmt.Errorf("protocol %d", proto)
	}
	if len(body) < least {
		return nil, errors.New("transport header cut")
	}
	h := &f.Header
	if h.Flags&tun.NeedsCsum != 0 {
		if int(h.CsumStart) != off || int(h.CsumOffset) != at {
			return nil, fmt.Errorf("checksum to fill in at %d+%d, want %d+%d", h.CsumStart, h.CsumOffset, off, at)
		}
		if want := pseudo(src, dst, proto, len(body)); binary.BigEndian.Uint16(body[at:]) != want {
			return nil, fmt.Errorf("checksum of the pseudo-header is %#x, want %#x", binary.BigEndian.Uint16(body[at:]), want)
		}
	}
	if h.GSOType == tun.GSOUDPL4 {
		return cutUDP(f, body, off)
	}
	if h.Flags&tun.NeedsCsum != 0 {
		binary.BigEndian.PutUint16(body[at:], ^checksum.Checksum(body, 0))
	}
	if proto == protoUDP {
		if n := int(binary.BigEndian.Uint16(body[4:])); n != len(body) {
			return nil, fmt.Errorf("UDP length %d of %d bytes", n, len(body))
		}
		if binary.BigEndian.Uint16(body[6:]) == 0 {
			return nil, errors.New("no UDP checksum")
		}
	}
	sum := uint16(0)
	if proto != protoICMP {
		sum = pseudo(src, dst, proto, len(body))
	}
	if checksum.Checksum(body, sum) != 0xffff {
		return nil, fmt.Errorf("wrong checksum, protocol %d", proto)
	}
	if err := checkTCPOffload(h, proto, body, off, v4); err != nil {
		return nil, err
	}
	return []Frame{f}, nil
}

// shape returns the length of a protocol's shortest header and the offset of the checksum in it; 0: it is not known.
func shape(proto uint8) (least, at int) {
	switch proto {
	case protoTCP:
		return 20, 16
	case protoUDP:
		return 8, 6
	case protoICMP, protoICMPv6:
		return 8, 2
	}
	return 0, 0
}

// checkTCPOffload checks what the header says of a TCP super-segment.
func checkTCPOffload(h *tun.Header, proto uint8, body []byte, off int, v4 bool) error {
	switch h.GSOType &^ tun.GSOECN {
	case tun.GSONone:
	case tun.GSOTCPv4, tun.GSOTCPv6:
		if proto != protoTCP || v4 != (h.GSOType&^tun.GSOECN == tun.GSOTCPv4) || h.GSOSize == 0 {
			return fmt.Errorf("offload header %+v for protocol %d", *h, proto)
		}
		if n := off + int(body[12]>>4)*4; int(h.HdrLen) != n {
			return fmt.Errorf("header length %d, want %d", h.HdrLen, n)
		}
	default:
		return fmt.Errorf("offload header %+v", *h)
	}
	return nil
}

// cutUDP returns the datagrams of a super-frame.
func cutUDP(f Frame, body []byte, off int) ([]Frame, error) {
	h := &f.Header
	_, _, proto, _, _ := f.ip()
	if proto != protoUDP || h.GSOSize == 0 || h.Flags&tun.NeedsCsum == 0 || int(h.HdrLen) != off+8 {
		return nil, fmt.Errorf("offload header %+v for protocol %d", *h, proto)
	}
	d, ok := f.UDP()
	if !ok || len(d.Payload) != len(body)-8 {
		return nil, errors.New("UDP length of a super-frame")
	}
	var out []Frame
	for rest := d.Payload; len(rest) > 0; {
		n := min(int(h.GSOSize), len(rest))
		out = append(out, Datagram{Src: d.Src, Dst: d.Dst, Payload: rest[:n]}.Frame())
		rest = rest[n:]
	}
	if len(out) > 128 {
		return nil, fmt.Errorf("a super-frame of %d datagrams", len(out))
	}
	return out, nil
}
