package socks

import (
	"errors"
	"fmt"
	"net/netip"
)

// uotName is the destination of a CONNECT that asks sing-box for UDP over TCP, version 2 (its documentation, "UDP
// over TCP", and common/uot of its library sing). The port is 0.
const uotName = "sp.v2.udp-over-tcp.arpa"

// Address types of a frame. They differ from those of RFC 1928, which the request after the CONNECT uses.
const (
	uotIPv4   = 0
	uotIPv6   = 1
	uotDomain = 2
)

// MaxUoTPayload is the longest datagram that is put into a frame. sing-box 1.14.1 reads each one into 16 KiB and ends
// the connection at a longer one. It cuts longer datagrams from the far end to that length.
const MaxUoTPayload = 16 << 10

// ErrUoTFrame means that a frame of UDP over TCP is malformed. Nothing after it can be understood.
var ErrUoTFrame = fmt.Errorf("%w: a frame of UDP over TCP", ErrMalformed)

var (
	errUoT      = errors.New("udp=over-tcp needs socks5, socks4a, http or https, and cannot be combined with tor")
	errUoTShort = errors.New("the connection did not take the request for UDP over TCP")
)

// uotRequest precedes the first frame. isConnect is 0, so each frame has an address; the destination, which is then
// unused, is written as in RFC 1928.
var uotRequest = []byte{0, atypIPv4, 0, 0, 0, 0, 0, 0}

// uotRefused converts the error of a server that refuses to connect to uotName into one about UDP.
func uotRefused(err error) error {
	return &refusal{text: "it takes no UDP over TCP: " + err.Error(), reply: ReplyCommandNotSupported}
}

// UoTCodec puts datagrams into the frames of UDP over TCP, version 2, and finds them there. It allocates nothing and
// may be used from any goroutine.
type UoTCodec struct{}

// AppendHeader appends to b the address and length that precede a payload of size bytes to dst. It returns b
// unchanged if no such frame exists: size is negative or over 65,535, or dst is invalid.
func (UoTCodec) AppendHeader(b []byte, dst netip.AddrPort, size int) []byte {
	ip := dst.Addr()
	switch {
	case size < 0 || size > 65535 || !dst.IsValid():
		return b
	case ip.Is4() || ip.Is4In6():
		v := ip.As4()
		b = append(append(b, uotIPv4), v[:]...)
	default:
		v := ip.As16()
		b = append(append(b, uotIPv6), v[:]...)
	}
	return append(b, byte(dst.Port()>>8), byte(dst.Port()), byte(size>>8), byte(size))
}

// AppendUoTName appends the header of a frame to a name, with a payload of size bytes. It leaves b as it is if there can be no
// such frame: size is negative or over 65,535, or the name is empty or longer than 255 bytes.
func AppendUoTName(b []byte, name string, port uint16, size int) []byte {
	if size < 0 || size > 65535 || name == "" || len(name) > maxName {
		return b
	}
	b = append(append(b, uotDomain, byte(len(name))), name...)
	return append(b, byte(port>>8), byte(port), byte(size>>8), byte(size))
}

// ParseHeader parses the beginning of b: n is the length of the header, and size that of the payload after it. n is 0
// if b is too short. src is invalid if the frame gives the name of its source instead of an address. The error is
// ErrUoTFrame.
func (UoTCodec) ParseHeader(b []byte) (src netip.AddrPort, n, size int, err error) {
	src, name, n, size, err := ParseUoTSource(b)
	if name != nil {
		return netip.AddrPort{}, n, size, err
	}
	return src, n, size, err
}

// ParseUoTSource is UoTCodec.ParseHeader, but if the frame gives the name of its source, name is a part of b, and src has only a
// port.
func ParseUoTSource(b []byte) (src netip.AddrPort, name []byte, n, size int, err error) {
	if len(b) < 2 {
		return src, nil, 0, 0, nil
	}
	switch b[0] {
	case uotIPv4:
		n = 1 + 4
	case uotIPv6:
		n = 1 + 16
	case uotDomain:
		n = 2 + int(b[1])
	default:
		return src, nil, 0, 0, ErrUoTFrame
	}
	if b[0] == uotDomain && b[1] == 0 {
		return src, nil, 0, 0, ErrUoTFrame
	}
	if len(b) < n+4 {
		return src, nil, 0, 0, nil
	}
	port := uint16(b[n])<<8 | uint16(b[n+1])
	size = int(b[n+2])<<8 | int(b[n+3])
	switch b[0] {
	case uotIPv4:
		src = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[1:5])), port)
	case uotIPv6:
		src = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[1:17])).Unmap(), port)
	case uotDomain:
		src, name = netip.AddrPortFrom(netip.Addr{}, port), b[2:n:n]
	}
	return src, name, n + 4, size, nil
}
