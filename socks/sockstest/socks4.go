package sockstest

import (
	"io"
	"net/netip"
)

// hear4 reads a request of SOCKS4 or 4a after its first byte, and checks the user. It returns false if the connection
// is over.
func (s *Server) hear4(c stream, x *exchange) bool {
	var head [7]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return false
	}
	ip := [4]byte(head[3:])
	x.Cmd = head[0]
	x.Dst = Addr{IP: netip.AddrFrom4(ip), Port: uint16(head[1])<<8 | uint16(head[2])}
	x.reply = reply4
	var ok bool
	if x.User, ok = readString(c); !ok {
		return false
	}
	if ip[0] == 0 && ip[1] == 0 && ip[2] == 0 && ip[3] != 0 {
		name, ok := readString(c)
		if !ok || name == "" {
			return false
		}
		x.Dst = Addr{Name: name, Port: x.Dst.Port}
	}
	if s.auth && x.User != s.user {
		s.answer(c, Fault{Raw: []byte{0, 0x5d, 0, 0, 0, 0, 0, 0}}, nil)
		return false
	}
	return true
}

// readString reads up to a zero byte.
func readString(c io.Reader) (string, bool) {
	var text []byte
	for len(text) < 512 {
		var b [1]byte
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return "", false
		}
		if b[0] == 0 {
			return string(text), true
		}
		text = append(text, b[0])
	}
	return "", false
}

// reply4 returns the SOCKS4 answer for a REP of SOCKS5.
func reply4(code byte, bound Addr) []byte {
	b := []byte{0, 0x5a, byte(bound.Port >> 8), byte(bound.Port), 0, 0, 0, 0}
	if code != 0 {
		b[1] = 0x5b
	}
	if ip := bound.IP.Unmap(); ip.Is4() {
		copy(b[4:], ip.AsSlice())
	}
	return b
}
