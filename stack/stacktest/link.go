package stacktest

import (
	"sync"

	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// link is gVisor's end of the device on the app's side. It is simple on purpose, and shares nothing with the link
// under test.
type link struct {
	dev tun.Device
	mu  sync.RWMutex // guards disp
	d   stack.NetworkDispatcher
}

var _ stack.GSOEndpoint = (*link)(nil)

func newLink(dev tun.Device) *link { return &link{dev: dev} }

func (l *link) SupportedGSO() stack.SupportedGSO {
	const need = tun.VnetHdr | tun.TSO
	if l.dev.Offload()&need == need {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

func (l *link) GSOMaxSize() uint32 { return 65535 }

// deliver passes a packet to gVisor, which verifies its checksums once more.
func (l *link) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	l.mu.RLock()
	d := l.d
	l.mu.RUnlock()
	if d != nil {
		d.DeliverNetworkPacket(proto, pkt)
	}
}

func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	n := 0
	for _, pkt := range pkts.AsSlice() {
		var h tun.Header
		if gso := pkt.GSOOptions; gso.Type != stack.GSONone && gso.NeedsCsum {
			h.Flags, h.CsumStart, h.CsumOffset = tun.NeedsCsum, gso.L3HdrLen, gso.CsumOffset
			if pkt.Data().Size() > int(gso.MSS) {
				h.GSOType, h.GSOSize, h.HdrLen = tun.GSOTCPv4, gso.MSS, uint16(pkt.HeaderSize())
				if gso.Type == stack.GSOTCPv6 {
					h.GSOType = tun.GSOTCPv6
				}
			}
		}
		v := pkt.ToView()
		err := l.dev.Write(&h, [][]byte{v.AsSlice()})
		v.Release()
		if err != nil {
			return n, &tcpip.ErrNoBufferSpace{}
		}
		n++
	}
	return n, nil
}

func (l *link) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	l.d = d
	l.mu.Unlock()
}

func (l *link) IsAttached() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.d != nil
}

func (l *link) MTU() uint32                                  { return uint32(l.dev.MTU()) }
func (l *link) SetMTU(uint32)                                {}
func (l *link) MaxHeaderLength() uint16                      { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress               { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)             {}
func (l *link) Capabilities() stack.LinkEndpointCapabilities { return 0 }
func (l *link) Wait()                                        {}
func (l *link) ARPHardwareType() header.ARPHardwareType      { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)                {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool         { return true }
func (l *link) Close()                                       {}
func (l *link) SetOnCloseAction(func())                      {}
