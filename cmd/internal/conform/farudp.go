package conform

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
)

// A datagram to the far end begins with a line "? ID I J SIZE": the answer comes from UDP socket [I][J], or for [0][0] from
// the one that was asked, with at least SIZE bytes. An answer begins with "! ID SEEN LENGTH SUM": who was seen to send, how
// many bytes came, and their CRC-32. Both are filled up with the same pattern.

// maxUDP is the largest payload of a datagram over IPv4.
const maxUDP = 65535 - 20 - 8

func (f *FarEnd) listenUDP(at netip.AddrPort) (*net.UDPConn, error) {
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	u.SetReadBuffer(1 << 20)
	f.all = append(f.all, u)
	return u, nil
}

func (f *FarEnd) answerUDP(u *net.UDPConn) {
	buf := make([]byte, maxUDP)
	for {
		n, from, err := u.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of somebody who went away
		}
		var id uint64
		var i, j, size int
		if _, err := fmt.Sscanf(string(buf[:min(n, farLine)]), "? %d %d %d %d\n", &id, &i, &j, &size); err != nil {
			continue
		}
		if i < 0 || i > 1 || j < 0 || j > 1 {
			continue
		}
		out := u
		if i != 0 || j != 0 {
			out = f.udp[i][j]
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		head := fmt.Sprintf("! %d %v %d %d\n", id, from, n, crc32.ChecksumIEEE(buf[:n]))
		out.WriteToUDPAddrPort(fill(head, size), from)
	}
}

// fill makes a payload of size bytes that begins with head; it is longer if head is.
func fill(head string, size int) []byte {
	b := make([]byte, max(len(head), min(size, maxUDP)))
	for i := copy(b, head); i < len(b); i++ {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// filled reports whether b is what fill made.
func filled(b []byte) bool {
	head, _, ok := bytes.Cut(b, []byte{'\n'})
	return ok && bytes.Equal(b, fill(string(head)+"\n", len(b)))
}
