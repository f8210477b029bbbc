package socks

import (
	"errors"
	"net/netip"
)

// Reasons for dropping a datagram from a relay. They are fixed values, so parsing allocates nothing.
var (
	ErrUDPShort    = errors.New("the datagram is shorter than its SOCKS header")
	ErrUDPFragment = errors.New("the datagram is a SOCKS fragment")
	ErrUDPHeader   = errors.New("the datagram's SOCKS header is malformed")
	ErrUDPName     = errors.New("the datagram's source is a name")
)

// AppendUDPHeader appends to b the header that precedes a datagram to dst (RFC 1928, section 7). It allocates only to
// grow b.
func AppendUDPHeader(b []byte, dst Addr) []byte {
	return appendAddr(append(b, 0, 0, 0), dst)
}

// ParseUDPHeader parses the header of a datagram from a relay. src is the sender, and b[n:] is the payload. It
// rejects a FRAG other than 0, which section 7 allows an implementation to drop, an RSV other than 0, an unknown
// ATYP, an empty name and a short header. It allocates only for a name.
func ParseUDPHeader(b []byte) (src Addr, n int, err error) {
	ap, name, n, err := parseUDPHeader(b)
	if err != nil {
		return Addr{}, 0, err
	}
	if name != nil {
		return Addr{Name: string(name), Port: ap.Port()}, n, nil
	}
	return AddrFrom(ap), n, nil
}

func parseUDPHeader(b []byte) (src netip.AddrPort, name []byte, n int, err error) {
	if len(b) < 5 {
		return src, nil, 0, ErrUDPShort
	}
	if b[0] != 0 || b[1] != 0 {
		return src, nil, 0, ErrUDPHeader
	}
	if b[2] != 0 {
		return src, nil, 0, ErrUDPFragment
	}
	var ip netip.Addr
	switch b[3] {
	case atypIPv4:
		n = 4 + 4
		if len(b) < n+2 {
			return src, nil, 0, ErrUDPShort
		}
		ip = netip.AddrFrom4([4]byte(b[4:8]))
	case atypIPv6:
		n = 4 + 16
		if len(b) < n+2 {
			return src, nil, 0, ErrUDPShort
		}
		ip = netip.AddrFrom16([16]byte(b[4:20])).Unmap()
	case atypName:
		n = 5 + int(b[4])
		if b[4] == 0 {
			return src, nil, 0, ErrUDPHeader
		}
		if len(b) < n+2 {
			return src, nil, 0, ErrUDPShort
		}
		name = b[5:n:n]
	default:
		return src, nil, 0, ErrUDPHeader
	}
	return netip.AddrPortFrom(ip, uint16(b[n])<<8|uint16(b[n+1])), name, n + 2, nil
}

// ParseUDPSource parses the header before a datagram as ParseUDPHeader does, but allocates nothing: if the source is a name,
// name is a part of b, and src has only a port.
func ParseUDPSource(b []byte) (src netip.AddrPort, name []byte, n int, err error) {
	return parseUDPHeader(b)
}

// UDPCodec adds and removes the headers of datagrams for endpoints without names. It allocates nothing and may be
// used from any goroutine.
type UDPCodec struct{}

// AppendHeader is AppendUDPHeader for an endpoint.
func (UDPCodec) AppendHeader(b []byte, dst netip.AddrPort) []byte {
	return appendEndpoint(append(b, 0, 0, 0), dst.Addr(), dst.Port())
}

// ParseHeader is ParseUDPHeader for an endpoint. A name gives ErrUDPName, because a reply needs an address to come
// from.
func (UDPCodec) ParseHeader(b []byte) (src netip.AddrPort, n int, err error) {
	src, name, n, err := parseUDPHeader(b)
	if err == nil && name != nil {
		return netip.AddrPort{}, 0, ErrUDPName
	}
	return src, n, err
}
