package stack

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

const (
	// maxUDP4 and maxUDP6 are the longest payloads that IP allows. The MTU does not limit them: a frame of any length
	// that is written to a TUN is delivered to a local socket.
	maxUDP4 = 65535 - ip4HeaderLen - udpHeaderLen
	maxUDP6 = 65535 - udpHeaderLen

	// maxSegments is UDP_MAX_SEGMENTS of the kernel: the maximum number of datagrams in one of its own super-frames.
	maxSegments = 128

	udpTTL = 64
)

// packetWriter implements flow.PacketWriter. It contains everything that a frame needs besides the payload, so that a
// write allocates nothing.
type packetWriter struct {
	s     *shard
	id    uint16 // ID of the next IPv4 header
	noUSO bool   // the device refused a super-frame
	hdr   tun.Header
	head  [ip6HeaderLen + udpHeaderLen]byte
	parts [1 + maxSegments][]byte
	icmp  [1280]byte
}

// PacketWriter returns a writer of datagrams to the apps of one shard. Each goroutine has its own. It need not be
// closed.
func (s *Stack) PacketWriter(shard int) flow.PacketWriter {
	// IDs start at a random value, so that two writers seldom use the same ID for the same pair of addresses at the
	// same time.
	return &packetWriter{s: s.shards[shard], id: uint16(rand.Uint32())}
}

// WritePackets implements flow.PacketWriter.
func (w *packetWriter) WritePackets(ps []flow.Packet) (n int, err error) {
	c := &w.s.stats.udp
	for len(ps) > 0 {
		p := &ps[0]
		limit, ok := addresses(p)
		if !ok || len(p.Payload) > limit {
			if ok {
				c.OutTooLong.Add(1)
			} else {
				c.OutAddress.Add(1)
			}
			ps = ps[1:]
			continue
		}
		run, size := w.run(ps, limit)
		err := w.write(ps[:run], size)
		if run > 1 && errors.Is(err, tun.ErrBadFrame) {
			w.noUSO = true // try again, one by one
			continue
		}
		if err == nil {
			n += run
			c.Out.Add(uint64(run))
			c.OutBytes.Add(uint64(size))
			if run > 1 {
				c.OutSuper.Add(1)
			}
		} else if gone(err) {
			return n, err
		} else {
			c.OutFull.Add(uint64(run))
		}
		ps = ps[run:]
	}
	return n, nil
}

// gone reports whether a write error means that the device is gone, as opposed to the loss of a single frame.
func gone(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADFD) // closed here; deleted in the kernel
}

// addresses checks that both endpoints of a datagram are of one family, and returns the maximum length of the
// payload.
func addresses(p *flow.Packet) (limit int, ok bool) {
	src, dst := p.Src.Addr(), p.Dst.Addr()
	switch {
	case src.Is4() && dst.Is4():
		return maxUDP4, true
	case src.Is6() && dst.Is6() && !src.Is4In6() && !dst.Is4In6():
		return maxUDP6, true
	}
	return 0, false
}

// run returns how many datagrams at the front of ps form one frame, and their payload bytes: those with the endpoints
// and the size of the first one, and one shorter datagram at the end. All together stay within limit.
func (w *packetWriter) run(ps []flow.Packet, limit int) (n, size int) {
	first := len(ps[0].Payload)
	n, size = 1, first
	const need = tun.VnetHdr | tun.USO
	if first == 0 || w.noUSO || w.s.dev.Offload()&need != need {
		return n, size
	}
	for n < len(ps) && n < maxSegments {
		p := &ps[n]
		m := len(p.Payload)
		if m == 0 || m > first || size+m > limit || p.Src != ps[0].Src || p.Dst != ps[0].Dst {
			break
		}
		n++
		size += m
		if m < first {
			break
		}
	}
	return n, size
}

// write writes ps as one frame: a datagram, or a super-frame of several. size is the sum of their payloads.
func (w *packetWriter) write(ps []flow.Packet, size int) error {
	n := udpHeaderLen + size
	h, addrs := w.ipHeader(ps, n)
	udp := w.head[len(h) : len(h)+udpHeaderLen]
	binary.BigEndian.PutUint16(udp, ps[0].Src.Port())
	binary.BigEndian.PutUint16(udp[2:], ps[0].Dst.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(n))
	udp[6], udp[7] = 0, 0
	sum := pseudoSum(addrs, protoUDP, n)

	w.hdr = tun.Header{}
	if w.s.dev.Offload()&tun.VnetHdr != 0 {
		w.hdr.Flags = tun.NeedsCsum
		w.hdr.HdrLen = uint16(len(h) + udpHeaderLen)
		w.hdr.CsumStart, w.hdr.CsumOffset = uint16(len(h)), 6
		if len(ps) > 1 {
			w.hdr.GSOType, w.hdr.GSOSize = tun.GSOUDPL4, uint16(len(ps[0].Payload))
		}
		binary.BigEndian.PutUint16(udp[6:], sum)
	} else {
		sum = checksum.Checksum(udp, sum)
		sum = ^checksum.Checksum(ps[0].Payload, sum)
		if sum == 0 {
			sum = 0xffff // zero would mean that there is none
		}
		binary.BigEndian.PutUint16(udp[6:], sum)
	}

	parts := append(w.parts[:0], w.head[:len(h)+udpHeaderLen])
	for i := range ps {
		if len(ps[i].Payload) > 0 {
			parts = append(parts, ps[i].Payload)
		}
	}
	err := w.s.write(&w.hdr, parts)
	clear(parts) // keep no reference to the payload
	return err
}

// ipHeader writes the IP header of a frame into w.head. n is the length of what follows it. It returns the header, and the
// addresses in it.
func (w *packetWriter) ipHeader(ps []flow.Packet, n int) (h, addrs []byte) {
	src, dst := ps[0].Src, ps[0].Dst
	if dst.Addr().Is4() {
		h = w.head[:ip4HeaderLen]
		h[0], h[1] = 0x45, 0
		binary.BigEndian.PutUint16(h[2:], uint16(ip4HeaderLen+n))
		// DF is not set, so a forwarder (for guests behind the host) may fragment the packet. The ID therefore counts
		// every segment.
		binary.BigEndian.PutUint16(h[4:], w.id)
		w.id += uint16(len(ps))
		h[6], h[7], h[8], h[9], h[10], h[11] = 0, 0, udpTTL, protoUDP, 0, 0
		addrs = h[12:20]
		s, d := src.Addr().As4(), dst.Addr().As4()
		copy(addrs, s[:])
		copy(addrs[4:], d[:])
		binary.BigEndian.PutUint16(h[10:], ^checksum.Checksum(h, 0))
	} else {
		h = w.head[:ip6HeaderLen]
		h[0], h[1], h[2], h[3] = 0x60, 0, 0, 0
		binary.BigEndian.PutUint16(h[4:], uint16(n))
		h[6], h[7] = protoUDP, udpTTL
		addrs = h[8:40]
		s, d := src.Addr().As16(), dst.Addr().As16()
		copy(addrs, s[:])
		copy(addrs[16:], d[:])
	}
	return h, addrs
}

// Refuse implements flow.PacketWriter.
func (w *packetWriter) Refuse(p flow.Packet, why flow.Refusal) {
	c := &w.s.stats.udp
	frame, ok := appendUnreachable(w.icmp[:0], p.Head, why)
	if ok {
		w.hdr = tun.Header{}
		parts := append(w.parts[:0], frame)
		ok = w.s.write(&w.hdr, parts) == nil
		clear(parts)
	}
	if ok {
		c.Refused.Add(1)
	} else if why != flow.RefuseSilent && why != flow.RefuseLater {
		c.RefusedMute.Add(1)
	}
}
