package conform

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
)

// A datagram to the far end begins with a line "? ID I J SIZE [TOKEN [COOKIE]]": the answer comes from UDP socket
// [I][J], or for [0][0] from the one that was asked, with at least SIZE bytes. An answer begins with "! ID SEEN
// LENGTH SUM [COOKIE]": the sender that was seen, how many bytes arrived, and their CRC-32. Both are padded with the
// same pattern. A public far end requires the token and the cookie, see guard, and its answers are no longer than the
// questions.

// question is the first line of a datagram to the far end.
type question struct {
	id            uint64
	from          [2]int
	size          int
	token, cookie string
}

func parseQuestion(b []byte) (q question, ok bool) {
	line, _, ok := bytes.Cut(b[:min(len(b), farLine)], []byte{'\n'})
	if !ok {
		return q, false
	}
	n, _ := fmt.Sscanf(string(line), "? %d %d %d %d %s %s", &q.id, &q.from[0], &q.from[1], &q.size, &q.token, &q.cookie)
	return q, n >= 4 && q.from[0]|q.from[1] == (q.from[0]|q.from[1])&1 && q.size >= 0
}

// minQuestion is longer than any first line of an answer.
const minQuestion = 140

func (q question) datagram(size int) []byte {
	head := fmt.Sprintf("? %d %d %d %d", q.id, q.from[0], q.from[1], q.size)
	if q.token == "" {
		return fill(head+"\n", size)
	}
	return fill(fmt.Sprintf("%s %s %s\n", head, q.token, q.cookie), max(size, minQuestion))
}

// answer returns the datagram that answers asked. It contains the address of the host that asked.
func (q question) answer(from netip.AddrPort, asked []byte, size int, cookie string) []byte {
	head := fmt.Sprintf("! %d %v %d %d", q.id, from, len(asked), crc32.ChecksumIEEE(asked))
	if cookie != "" {
		head += " " + cookie
	}
	return fill(head+"\n", size)
}

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
			continue // an ICMP error about a client that went away
		}
		q, ok := parseQuestion(buf[:n])
		if !ok {
			continue
		}
		out := u
		if q.from != [2]int{} {
			out = f.udp[q.from[0]][q.from[1]]
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		out.WriteToUDPAddrPort(q.answer(from, buf[:n], q.size, ""), from)
	}
}

// fill returns a payload of size bytes that begins with head; it is longer if head is.
func fill(head string, size int) []byte {
	b := make([]byte, max(len(head), min(size, maxUDP)))
	for i := copy(b, head); i < len(b); i++ {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// filled reports whether b was made by fill.
func filled(b []byte) bool {
	head, _, ok := bytes.Cut(b, []byte{'\n'})
	return ok && bytes.Equal(b, fill(string(head)+"\n", len(b)))
}
