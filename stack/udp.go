package stack

import (
	"encoding/binary"
	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// UDP from the app does not pass through gVisor: the frame reader finds the datagrams in its frames and passes them
// on in bursts, without copying. Only fragments go through gVisor, for reassembly, and come back by handleSlowUDP.

// UnreachableHandler may be implemented by a Handler. HandleUnreachable is called when the app's kernel has answered
// a datagram from remote with ICMP port unreachable: the app has no socket at the endpoint app. shard is that of app.
// It is called on that shard's frame reader and must not block.
type UnreachableHandler interface {
	HandleUnreachable(shard int, app, remote netip.AddrPort)
}

// udpBurst is how many datagrams are passed on at once. It is more than a super-frame contains (UDP_MAX_SEGMENTS of
// the kernel is 128), so that one seldom needs two bursts.
const udpBurst = 256

// udpBatch collects the datagrams of a burst of frames. It belongs to the frame reader.
type udpBatch struct {
	s           *shard
	unreachable UnreachableHandler // nil: the Handler does not implement it
	pkts        []flow.Packet      // made once; its slices point into the reader's frames
	bytes       uint64             // payload bytes in pkts
}

func (s *shard) newUDPBatch() *udpBatch {
	u, _ := s.handler.(UnreachableHandler)
	return &udpBatch{s: s, unreachable: u, pkts: make([]flow.Packet, 0, udpBurst)}
}

// add takes a frame that is UDP and not a fragment, and counts what it drops. p is the result of parseIP. It returns
// false for all other frames, which then go to gVisor. The frame must not change until flush; a super-frame is split
// without a copy.
//
// gVisor could handle extension headers, but not a checksum that is not filled in, nor a super-frame. Only fragments,
// which have neither, are left to it.
func (b *udpBatch) add(frame []byte, p *packet, h *tun.Header) bool {
	switch {
	case p.frag:
		b.flush() // datagrams from before a fragment are passed on before it
	case p.routed:
	case p.proto == protoUDP:
		if !p.v6 && !checksumDone(h) && checksum.Checksum(frame[:p.off], 0) != 0xffff {
			b.s.stats.udp.DroppedChecksum.Add(1)
		} else {
			b.addUDP(frame[:p.end], p.off, h)
		}
		return true
	case p.proto == protoICMP && !p.v6, p.proto == protoICMPv6 && p.v6:
		return b.addICMP(frame[:p.end], p.off, h)
	}
	return false
}

// checksumDone reports whether the checksum of the frame must not, or need not, be verified.
func checksumDone(h *tun.Header) bool { return h.Flags&(tun.NeedsCsum|tun.DataValid) != 0 }

// addUDP takes the datagrams of p, an IP packet with its UDP header at off.
func (b *udpBatch) addUDP(p []byte, off int, h *tun.Header) {
	c := &b.s.stats.udp
	udp := p[off:]
	if len(udp) < udpHeaderLen {
		c.DroppedMalformed.Add(1)
		return
	}
	n := int(binary.BigEndian.Uint16(udp[4:]))
	sport, dport := binary.BigEndian.Uint16(udp), binary.BigEndian.Uint16(udp[2:])
	// RFC 768 allows source port 0 for senders that want no answer, but then there is no endpoint to map.
	if n < udpHeaderLen || n > len(udp) || sport == 0 || dport == 0 {
		c.DroppedMalformed.Add(1)
		return
	}
	udp = udp[:n:n]
	// A checksum position outside the datagram's own checksum field would be in the payload and never be filled in.
	if h.Flags&tun.NeedsCsum != 0 && (int(h.CsumStart) != off || h.CsumOffset != 6) {
		c.DroppedMalformed.Add(1)
		return
	}

	var src, dst netip.Addr
	if p[0]>>4 == 4 {
		src, dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	} else {
		src, dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	}
	if !b.s.carried(src, dst, dport) {
		return
	}

	size, ok := b.datagramSize(p, udp, h)
	if !ok {
		return
	}
	from, to := netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	head := p[: off+udpHeaderLen : off+udpHeaderLen]
	payload := udp[udpHeaderLen:]
	for {
		m := min(size, len(payload))
		if len(b.pkts) == cap(b.pkts) {
			b.flush()
		}
		b.pkts = append(b.pkts, flow.Packet{Src: from, Dst: to, Payload: payload[:m:m], Head: head})
		b.bytes += uint64(m)
		payload = payload[m:]
		if len(payload) == 0 {
			return
		}
	}
}

// datagramSize returns the payload bytes of each datagram in udp, which is the UDP part of the IP packet p. ok is false if the
// frame was dropped, because its checksum or offload header is wrong.
func (b *udpBatch) datagramSize(p, udp []byte, h *tun.Header) (size int, ok bool) {
	c := &b.s.stats.udp
	switch h.GSOType {
	case tun.GSONone:
		if !checksumDone(h) && !verifyUDP(p, udp) {
			c.DroppedChecksum.Add(1)
			return 0, false
		}
		return len(udp) - udpHeaderLen, true
	case tun.GSOUDPL4:
		// The checksum field of a super-frame belongs to none of its datagrams, so without a flag nothing could be
		// verified.
		if h.GSOSize == 0 || !checksumDone(h) {
			c.DroppedMalformed.Add(1)
			return 0, false
		}
		c.InSuper.Add(1)
		return int(h.GSOSize), true
	default:
		c.DroppedMalformed.Add(1)
		return 0, false
	}
}

// carried reports whether datagrams from src to dst go to the handler at all, and counts them if they do not.
func (s *shard) carried(src, dst netip.Addr, port uint16) bool {
	// Multicast and broadcast (local peer discovery, SSDP, mDNS, DHCP) are meant for the app's own link. A proxy
	// would carry them to another link.
	if dst.IsMulticast() || dst == broadcast {
		if s.ssdp.Load() && dst == flow.SSDP.Addr() && port == flow.SSDP.Port() && flow.OneHost(src) {
			return true
		}
		s.stats.udp.DroppedMulticast.Add(1)
		return false
	}
	if !flow.OneHost(src) || !unicast(dst) || dst.Is6() && dst.IsLinkLocalUnicast() {
		s.stats.udp.DroppedAddress.Add(1)
		return false
	}
	return true
}

// verifyUDP verifies the checksum of udp, a whole datagram of the IP packet p. Zero means no checksum over IPv4, and
// is forbidden over IPv6 (RFC 768; RFC 8200, section 8.1).
func verifyUDP(p, udp []byte) bool {
	addrs := p[12:20]
	if p[0]>>4 == 6 {
		addrs = p[8:40]
	}
	if udp[6]|udp[7] == 0 {
		return len(addrs) == 8
	}
	return checksum.Checksum(udp, pseudoSum(addrs, protoUDP, len(udp))) == 0xffff
}

// addICMP takes p, an IP packet with its ICMP header at off, if it is a port unreachable about a datagram that we
// wrote.
func (b *udpBatch) addICMP(p []byte, off int, h *tun.Header) bool {
	app, remote, ok := parseUnreachable(p, off, checksumDone(h))
	if !ok {
		return false
	}
	b.s.stats.udp.Unreachable.Add(1)
	if b.unreachable != nil {
		b.unreachable.HandleUnreachable(b.s.index, app, remote)
	}
	return true
}

// full reports whether flush should be called before the next add. add still works if it is not.
func (b *udpBatch) full() bool { return len(b.pkts) == cap(b.pkts) }

// flush passes the datagrams on, if there are any. After it, the frames may be reused.
func (b *udpBatch) flush() {
	if len(b.pkts) == 0 {
		return
	}
	b.s.stats.udp.In.Add(uint64(len(b.pkts)))
	b.s.stats.udp.InBytes.Add(b.bytes)
	b.s.handler.HandlePackets(b.s.index, b.pkts)
	b.pkts, b.bytes = b.pkts[:0], 0
}
