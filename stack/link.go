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

// link is gVisor's view of the device. gVisor's own endpoint for file descriptors can't do segmentation offload on a
// TUN (it has it for sockets only), and without it the download falls to a sixth.
type link struct {
	s     *shard
	mtu   uint32
	gso   bool
	disp  gstack.NetworkDispatcher
	frame sync.Pool // of *outFrame

	// verified: the frame being delivered has a checksum that need not be verified. gVisor takes this from
	// Capabilities, which it asks anew for each frame and on the frame reader only.
	verified atomic.Bool
	// plain is where the packet being delivered ends in its frame, if it is a TCP segment whose TCP header stands behind an IP
	// header without options or extensions, else 0. The frame reader writes it, and the IP layer reads it.
	plain int
}

var (
	_ gstack.GSOEndpoint        = (*link)(nil)
	_ gstack.QueueingDiscipline = (*link)(nil)
)

// outFrame is what one write needs, kept so that a write allocates nothing.
type outFrame struct {
	h     tun.Header
	parts [][]byte
	skip  int // header space not used, still to be skipped
	flat  []byte
}

// maxParts bounds what is handed to writev, well below IOV_MAX (1024). A packet of more slices than that is made of
// tiny writes, and is joined.
const maxParts = 128

func newLink(s *shard) *link {
	off := s.dev.Offload()
	l := &link{s: s, mtu: uint32(s.dev.MTU()), gso: off&(tun.VnetHdr|tun.TSO) == tun.VnetHdr|tun.TSO}
	l.frame.New = func() any { return &outFrame{parts: make([][]byte, 0, maxParts)} }
	return l
}

// SupportedGSO is gVisor's question whether a packet may be longer than the MTU.
func (l *link) SupportedGSO() gstack.SupportedGSO {
	if l.gso {
		return gstack.HostGSOSupported
	}
	return gstack.GSONotSupported
}

// GSOMaxSize is the longest IP packet.
func (l *link) GSOMaxSize() uint32 { return 65535 }

// Capabilities never has TX checksum offload: gVisor would then leave the checksums of SYN-ACK and RST blank, for which
// no GSO options tell us where they go. Data segments still go out with NeedsCsum.
func (l *link) Capabilities() gstack.LinkEndpointCapabilities {
	if l.verified.Load() {
		return gstack.CapabilityRXChecksumOffload
	}
	return gstack.CapabilityNone
}

// WritePackets is what gVisor asks of a link. WritePacket spares it the list, an allocation for each frame.
func (l *link) WritePackets(pkts gstack.PacketBufferList) (n int, err tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		if err := l.WritePacket(pkt); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// WritePacket is that of gVisor's QueueingDiscipline, and queues nothing: it writes to the device on the caller's goroutine,
// since a writer goroutine gained nothing. A frame that the device does not take is lost as on a wire.
func (l *link) WritePacket(pkt *gstack.PacketBuffer) tcpip.Error {
	// TCP is all that gVisor may say: echo replies, neighbour discovery and its ICMP errors would be lies.
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber {
		l.s.stats.droppedProto.Add(1)
		return nil
	}
	if err := l.write(pkt); err != nil {
		l.s.stats.droppedOut.Add(1)
		if errors.Is(err, os.ErrClosed) {
			return &tcpip.ErrClosedForSend{}
		}
		return &tcpip.ErrNoBufferSpace{}
	}
	return nil
}

func (l *link) write(pkt *gstack.PacketBuffer) error {
	f := l.frame.Get().(*outFrame)
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
	views, skip := pkt.AsViewList()
	f.skip = skip
	for v := views.Front(); v != nil; v = v.Next() {
		f.add(v)
	}
	size := pkt.Size()
	err := l.s.dev.Write(&f.h, f.parts)
	clear(f.parts) // nothing of the packet stays referenced
	f.parts = f.parts[:0]
	l.frame.Put(f)
	if err != nil {
		return err
	}
	l.s.stats.framesOut.Add(1)
	l.s.stats.bytesOut.Add(uint64(size))
	return nil
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
