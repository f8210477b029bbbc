package stack

import (
	"encoding/binary"
	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// The types of echo requests and replies (RFC 792; RFC 4443, section 4).
const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
)

// EchoHandler may be implemented by a Handler. HandleEcho receives an ICMP echo request on the frame reader of a shard and
// must not block. If it returns false, it does not want the request, which is then dropped as without an EchoHandler.
type EchoHandler interface {
	HandleEcho(shard int, e flow.Echo) bool
}

// isEcho reports whether a frame is an echo request. b is the frame and p the result of parseIP.
func isEcho(b []byte, p *packet) bool {
	want, proto := byte(echoRequest4), byte(protoICMP)
	if p.v6 {
		want, proto = echoRequest6, protoICMPv6
	}
	return p.proto == proto && !p.frag && !p.routed && p.end-p.off >= icmpHeaderLen && b[p.off] == want && b[p.off+1] == 0
}

// takeEcho offers a packet of ICMP to the EchoHandler. The packet is not a flow's error. Requests in fragments are not taken,
// nor those to an address that is not that of a single host beyond this link.
func (s *shard) takeEcho(h *tun.Header, b []byte, p *packet) bool {
	if s.echo == nil || h.GSOType != tun.GSONone || !isEcho(b, p) {
		return false
	}
	var src, dst netip.Addr
	sum := uint16(0)
	if icmp := b[p.off:p.end]; p.v6 {
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		sum = checksum.Checksum(icmp, pseudoSum(b[8:40], protoICMPv6, len(icmp)))
	} else {
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		sum = checksum.Checksum(icmp, 0)
	}
	if !flow.OneHost(src) || !flow.OneHost(dst) || dst.Is6() && dst.IsLinkLocalUnicast() {
		return false
	}
	if !checksumDone(h) && (sum != 0xffff || !p.v6 && checksum.Checksum(b[:p.off], 0) != 0xffff) {
		s.stats.DroppedChecksum.Add(1)
		return true
	}
	return s.echo.HandleEcho(s.index, flow.Echo{Src: src, Dst: dst, Packet: b[:p.end:p.end], By: s})
}

// ReplyEcho implements flow.EchoWriter.
func (s *shard) ReplyEcho(packet []byte) {
	p, ok := parseIP(packet)
	if !ok || p.end-p.off < icmpHeaderLen {
		return
	}
	s.send(appendEchoReply(make([]byte, 0, len(packet)), packet, &p))
}

// RefuseEcho implements flow.EchoWriter.
func (s *shard) RefuseEcho(packet []byte, why flow.Refusal) {
	if b, ok := appendUnreachable(nil, packet, why); ok {
		s.send(b)
	}
}

// send writes an IP packet that we have built.
func (s *shard) send(b []byte) {
	if err := s.write(&tun.Header{}, [][]byte{b}); err != nil {
		s.stats.DroppedOut.Add(1)
		return
	}
	s.stats.FramesOut.Add(1)
	s.stats.BytesOut.Add(uint64(len(b)))
}

// appendEchoReply appends to b the whole IP packet that answers the echo request q, with its checksums. It has neither the
// IP options nor the extension headers of the request.
func appendEchoReply(b, q []byte, p *packet) []byte {
	icmp := q[p.off:p.end]
	start := len(b)
	if p.v6 {
		b = append(b, 0x60, 0, 0, 0, byte(len(icmp)>>8), byte(len(icmp)), protoICMPv6, icmpTTL)
		b = append(append(b, q[24:40]...), q[8:24]...)
	} else {
		n := ip4HeaderLen + len(icmp)
		b = append(b, 0x45, q[1], byte(n>>8), byte(n), 0, 0, 0x40, 0, icmpTTL, protoICMP, 0, 0)
		b = append(append(b, q[16:20]...), q[12:16]...)
		binary.BigEndian.PutUint16(b[start+10:], ^checksum.Checksum(b[start:], 0))
	}
	at := len(b)
	b = append(b, icmp...)
	reply, sum := b[at:], uint16(0)
	reply[0] = echoReply4
	if p.v6 {
		reply[0], sum = echoReply6, pseudoSum(b[start+8:start+40], protoICMPv6, len(icmp))
	}
	reply[2], reply[3] = 0, 0
	binary.BigEndian.PutUint16(reply[2:], ^checksum.Checksum(reply, sum))
	return b
}
