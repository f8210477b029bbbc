package stack

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// link is the device as gVisor sees it. gVisor's own endpoint for file descriptors cannot do segmentation offload on
// a TUN (it can for sockets only), and without it the download speed falls to a sixth.
type link struct {
	s     *shard
	mtu   uint32
	gso   bool
	disp  gstack.NetworkDispatcher
	frame sync.Pool // of *outFrame

	// verified is set while the frame being delivered has a checksum that need not be verified. gVisor reads this
	// from Capabilities, which it calls again for each frame, and only on the frame reader.
	verified atomic.Bool
	// plain is the end of the packet being delivered within its frame if it is a TCP segment whose TCP header follows
	// an IP header without options or extensions, and 0 otherwise. The frame reader writes it, and the IP layer reads
	// it.
	plain int
}

var (
	_ gstack.GSOEndpoint        = (*link)(nil)
	_ gstack.QueueingDiscipline = (*link)(nil)
)

// outFrame holds what one write needs, so that a write allocates nothing.
type outFrame struct {
	h     tun.Header
	parts [][]byte
	skip  int // unused header space that is still to be skipped
	flat  []byte
}

// maxParts limits the parts passed to writev, well below IOV_MAX (1024). A packet of more slices consists of tiny
// writes and is joined.
const maxParts = 128

func newLink(s *shard) *link {
	off := s.dev.Offload()
	l := &link{s: s, mtu: uint32(s.dev.MTU()), gso: off&(tun.VnetHdr|tun.TSO) == tun.VnetHdr|tun.TSO}
	l.frame.New = func() any { return &outFrame{parts: make([][]byte, 0, maxParts)} }
	return l
}

// SupportedGSO tells gVisor whether a packet may be longer than the MTU.
func (l *link) SupportedGSO() gstack.SupportedGSO {
	if l.gso {
		return gstack.HostGSOSupported
	}
	return gstack.GSONotSupported
}

// GSOMaxSize returns the length of the longest IP packet.
func (l *link) GSOMaxSize() uint32 { return 65535 }

// Capabilities never includes TX checksum offload: gVisor would then leave the checksums of SYN-ACK and RST blank,
// and no GSO options would tell where they belong. Data segments are still sent with NeedsCsum.
func (l *link) Capabilities() gstack.LinkEndpointCapabilities {
	if l.verified.Load() {
		return gstack.CapabilityRXChecksumOffload
	}
	return gstack.CapabilityNone
}

// WritePackets implements gVisor's LinkEndpoint. WritePacket avoids its list, which is an allocation for each frame.
func (l *link) WritePackets(pkts gstack.PacketBufferList) (n int, err tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		if err := l.WritePacket(pkt); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// WritePacket implements gVisor's QueueingDiscipline without a queue: it writes to the device on the caller's
// goroutine, because a writer goroutine brought no gain. A frame that the device does not accept is lost, as on a
// wire.
func (l *link) WritePacket(pkt *gstack.PacketBuffer) tcpip.Error {
	// gVisor may send only TCP. Its echo replies, neighbour discovery and ICMP errors would be false.
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber {
		l.s.stats.DroppedProto.Add(1)
		return nil
	}
	if err := l.write(pkt); err != nil {
		l.s.stats.DroppedOut.Add(1)
		if errors.Is(err, os.ErrClosed) {
			return &tcpip.ErrClosedForSend{}
		}
		return &tcpip.ErrNoBufferSpace{}
	}
	return nil
}

func (l *link) write(pkt *gstack.PacketBuffer) error {
	f := l.frame.Get().(*outFrame)
	f.setHeader(pkt)
	if l.s.acks.hold(pkt, &f.h) {
		l.frame.Put(f)
		return nil
	}
	views, skip := pkt.AsViewList()
	f.skip = skip
	for v := views.Front(); v != nil; v = v.Next() {
		f.add(v)
	}
	size := pkt.Size()
	err := l.s.write(&f.h, f.parts)
	clear(f.parts) // keep no reference to the packet
	f.parts = f.parts[:0]
	l.frame.Put(f)
	if err != nil {
		return err
	}
	l.s.stats.FramesOut.Add(1)
	l.s.stats.BytesOut.Add(uint64(size))
	return nil
}

// setHeader sets the offload header of pkt.
func (f *outFrame) setHeader(pkt *gstack.PacketBuffer) {
	f.h = tun.Header{}
	if gso := &pkt.GSOOptions; gso.Type != gstack.GSONone && gso.NeedsCsum {
		f.h.Flags = tun.NeedsCsum
		f.h.CsumStart, f.h.CsumOffset = gso.L3HdrLen, gso.CsumOffset
		if pkt.Data().Size() > int(gso.MSS) {
			f.h.GSOType = tun.GSOTCPv4
			if gso.Type == gstack.GSOTCPv6 {
				f.h.GSOType = tun.GSOTCPv6
			}
			f.h.GSOSize, f.h.HdrLen = gso.MSS, uint16(pkt.HeaderSize())
		}
	}
}

func (f *outFrame) add(v *buffer.View) {
	b := v.AsSlice()
	if f.skip != 0 {
		n := min(f.skip, len(b))
		f.skip -= n
		b = b[n:]
	}
	switch {
	case len(b) == 0:
	case len(f.parts) < maxParts:
		f.parts = append(f.parts, b)
	default:
		if len(f.parts[maxParts-1]) == 0 || len(f.flat) == 0 || &f.parts[maxParts-1][0] != &f.flat[0] {
			f.flat = append(f.flat[:0], f.parts[maxParts-1]...)
		}
		f.flat = append(f.flat, b...)
		f.parts[maxParts-1] = f.flat
	}
}

func (l *link) MTU() uint32                             { return l.mtu }
func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Attach(d gstack.NetworkDispatcher)       { l.disp = d }
func (l *link) IsAttached() bool                        { return l.disp != nil }
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*gstack.PacketBuffer)          {}
func (l *link) ParseHeader(*gstack.PacketBuffer) bool   { return true }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
