package stack

import (
	"encoding/binary"
	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// tcpHeaderLen is the length of a header without options.
const tcpHeaderLen = 20

// handleTCP handles the segments for which gVisor has no endpoint. It runs on the frame reader. If it returns false,
// gVisor answers with RST, as RFC 9293, section 3.10.7.1, requires for a connection that does not exist.
func (s *shard) handleTCP(id gstack.TransportEndpointID, pkt *gstack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < tcpHeaderLen {
		s.stats.DroppedMalformed.Add(1)
		return true
	}
	_, csum, ok := header.TCPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()),
		id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated)
	switch {
	case !ok || id.RemotePort == 0 || id.LocalPort == 0:
		s.stats.DroppedMalformed.Add(1)
		return true
	case !csum:
		s.stats.DroppedChecksum.Add(1)
		return true
	}
	key := tupleOf(&id)
	switch flags := h.Flags(); {
	case flags&header.TCPFlagRst != 0:
		s.pending.rst(key, h.SequenceNumber())
		return true
	case flags&header.TCPFlagSyn != 0 && flags&header.TCPFlagAck == 0:
		if flags&header.TCPFlagFin != 0 { // ignored, as in Linux: it is never sent on purpose
			s.stats.DroppedMalformed.Add(1)
			return true
		}
		if req := s.pending.syn(key, h.SequenceNumber(), pkt); req != nil {
			s.handler.HandleStream(s.index, req)
		}
		return true
	}
	return false
}

// addrTo converts a to gVisor's address type.
func addrTo(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

// answer writes the RST or ICMP error for why to the app. syn contains the SYN's IP and TCP headers.
func (s *shard) answer(syn []byte, why flow.Refusal) {
	var b []byte
	ok := false
	if why == flow.RefuseReset || why == flow.RefusePort {
		b, ok = appendReset(nil, syn)
	} else {
		b, ok = appendUnreachable(nil, syn, why)
	}
	if ok {
		s.send(b) // if it is lost, the SYN is retransmitted and answered again
	}
}

// synHeaders returns a copy of the IP and TCP headers of pkt.
func synHeaders(pkt *gstack.PacketBuffer) []byte {
	n, t := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	return append(append(make([]byte, 0, len(n)+len(t)), n...), t...)
}

// appendReset appends the RST that refuses a SYN (RFC 9293, section 3.10.7.1), as an IP packet with its checksums.
// syn contains the IP and TCP headers of the SYN, which may have carried data.
func appendReset(b, syn []byte) ([]byte, bool) {
	if len(syn) < ip4HeaderLen {
		return b, false
	}
	start, off, total := len(b), 0, 0
	switch syn[0] >> 4 {
	case 4:
		off, total = int(syn[0]&0xf)*4, int(binary.BigEndian.Uint16(syn[2:]))
		if off < ip4HeaderLen || len(syn) < off+tcpHeaderLen {
			return b, false
		}
		b = append(b, 0x45, 0, 0, ip4HeaderLen+tcpHeaderLen, 0, 0, 0x40, 0, 64, protoTCP, 0, 0)
		b = append(append(b, syn[16:20]...), syn[12:16]...)
		ip := b[start:]
		binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip, 0))
	case 6:
		if len(syn) < ip6HeaderLen {
			return b, false
		}
		u, ok := walk6(syn, syn[6], ip6HeaderLen)
		off = u.off
		total = ip6HeaderLen + int(binary.BigEndian.Uint16(syn[4:]))
		if !ok || u.frag || u.routed || u.proto != protoTCP || len(syn) < off+tcpHeaderLen {
			return b, false
		}
		b = append(b, 0x60, 0, 0, 0, 0, tcpHeaderLen, protoTCP, 64)
		b = append(append(b, syn[24:40]...), syn[8:24]...)
	default:
		return b, false
	}
	t := syn[off:]
	data := max(0, total-off-int(t[12]>>4)*4) // TCP Fast Open
	ack := binary.BigEndian.Uint32(t[4:]) + 1 + uint32(data)
	tcpStart := len(b)
	b = append(b, t[2], t[3], t[0], t[1], 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, ack)
	b = append(b, tcpHeaderLen/4<<4, byte(header.TCPFlagRst|header.TCPFlagAck), 0, 0, 0, 0, 0, 0)
	sum := uint16(protoTCP + tcpHeaderLen) // of the pseudo-header
	if syn[0]>>4 == 4 {
		sum = checksum.Checksum(b[start+12:start+20], sum)
	} else {
		sum = checksum.Checksum(b[start+8:start+40], sum)
	}
	binary.BigEndian.PutUint16(b[tcpStart+16:], ^checksum.Checksum(b[tcpStart:], sum))
	return b, true
}
