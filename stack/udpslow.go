package stack

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"github.com/viasocks/viasocks/stack/flow"
	"gvisor.dev/gvisor/pkg/tcpip"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// slowUDP is what is needed to pass on one datagram from gVisor.
type slowUDP struct {
	pkt  [1]flow.Packet
	head []byte
	data []byte // UDP header and payload
}

func (w *slowUDP) Write(p []byte) (int, error) {
	w.data = append(w.data, p...)
	return len(p), nil
}

// slowPool exists because it is not guaranteed that gVisor always calls on the frame reader.
var slowPool = sync.Pool{New: func() any { return new(slowUDP) }}

// handleSlowUDP takes a datagram that came in fragments out of gVisor. gVisor has reassembled it and verified the IP
// header, but not the UDP checksum. The result is always true, so that gVisor does not answer.
func (s *shard) handleSlowUDP(id gstack.TransportEndpointID, pkt *gstack.PacketBuffer) bool {
	c := &s.stats.udp
	ip, udp := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	if len(udp) < udpHeaderLen || len(ip) < ip4HeaderLen || ip[0]>>4 == 6 && len(ip) < ip6HeaderLen {
		c.DroppedMalformed.Add(1)
		return true
	}
	n := int(binary.BigEndian.Uint16(udp[4:]))
	if n < udpHeaderLen || n > udpHeaderLen+pkt.Data().Size() || id.RemotePort == 0 || id.LocalPort == 0 {
		c.DroppedMalformed.Add(1)
		return true
	}
	src, dst := addrFrom(id.RemoteAddress), addrFrom(id.LocalAddress)
	if !s.carried(src, dst, id.LocalPort) {
		return true
	}

	w := slowPool.Get().(*slowUDP)
	defer func() {
		w.pkt[0] = flow.Packet{}
		slowPool.Put(w)
	}()
	w.data = append(w.data[:0], udp[:udpHeaderLen]...)
	if _, err := pkt.Data().ReadTo(w, true); err != nil {
		c.DroppedMalformed.Add(1)
		return true
	}
	w.data = w.data[:n]
	if !verifyUDP(ip, w.data) {
		c.DroppedChecksum.Add(1)
		return true
	}
	if ip[0]>>4 == 6 {
		// Build the headers as if it had come whole: gVisor drops what follows the fragment header and keeps its next
		// header.
		w.head = append(w.head[:0], ip[:ip6HeaderLen]...)
		binary.BigEndian.PutUint16(w.head[4:], uint16(n))
		w.head[6] = protoUDP
	} else {
		w.head = append(w.head[:0], ip...)
	}
	w.head = append(w.head, udp[:udpHeaderLen]...)

	c.In.Add(1)
	c.InReassembled.Add(1)
	c.InBytes.Add(uint64(n - udpHeaderLen))
	w.pkt[0] = flow.Packet{
		Src: netip.AddrPortFrom(src, id.RemotePort), Dst: netip.AddrPortFrom(dst, id.LocalPort),
		Payload: w.data[udpHeaderLen:n:n], Head: w.head,
	}
	s.handler.HandlePackets(s.index, w.pkt[:])
	return true
}

// addrFrom converts gVisor's address. It returns the zero Addr if a is neither IPv4 nor IPv6.
func addrFrom(a tcpip.Address) netip.Addr {
	switch a.BitLen() {
	case 32:
		return netip.AddrFrom4(a.As4())
	case 128:
		return netip.AddrFrom16(a.As16())
	}
	return netip.Addr{}
}
