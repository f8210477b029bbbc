package stack

import (
	"math"
	"math/rand/v2"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/header/parse"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// gVisor's IP endpoints keep a table of the addresses that are theirs. In a stack that takes every address, each
// destination in use gets a temporary entry, and the cost of a packet depends on how many entries there are: IPv4 compares
// an address that the table does not hold with all that it does hold, since it could be the broadcast address of one of
// their subnets, and both families keep the entries in a list that they search when an entry goes.
//
// The IP layer here stands before gVisor's endpoint and has one state for all addresses, so nothing is looked up, added or
// removed, and gVisor's table stays empty. It also hands a plain TCP segment to the transport layer by itself. All other
// packets take their way through gVisor's endpoint: fragments, options and extension headers, ICMP, and what is malformed.

// ipProtocol is gVisor's IPv4 or IPv6, with an ipEndpoint in place of its endpoint.
type ipProtocol struct {
	gstack.NetworkProtocol
	l *link
}

// overIP wraps what makes gVisor's IPv4 or IPv6 over l.
func (l *link) overIP(f gstack.NetworkProtocolFactory) gstack.NetworkProtocolFactory {
	return func(ns *gstack.Stack) gstack.NetworkProtocol { return ipProtocol{f(ns), l} }
}

// NewEndpoint is that of gVisor's NetworkProtocol.
func (p ipProtocol) NewEndpoint(nic gstack.NetworkInterface, up gstack.TransportDispatcher) gstack.NetworkEndpoint {
	up = &resetWatch{up, p.l.s}
	inner := p.NetworkProtocol.NewEndpoint(nic, up)
	e := &ipEndpoint{NetworkEndpoint: inner, AddressableEndpoint: inner.(gstack.AddressableEndpoint), nic: nic, up: up, l: p.l}
	none := tcpip.AddrFrom4([4]byte{})
	if p.Number() == header.IPv6ProtocolNumber {
		none = tcpip.AddrFrom16([16]byte{})
	}
	e.every.prefix = none.WithPrefix()
	e.every.subnet = e.every.prefix.Subnet()
	return e
}

// ipEndpoint is the IP layer of one family. The two that it embeds are gVisor's endpoint.
type ipEndpoint struct {
	gstack.NetworkEndpoint
	gstack.AddressableEndpoint

	nic   gstack.NetworkInterface
	up    gstack.TransportDispatcher
	l     *link
	every everyAddress
}

// AcquireAssignedAddress is that of gVisor's AddressableEndpoint. Where any address may be used, all have the one state.
func (e *ipEndpoint) AcquireAssignedAddress(
	a tcpip.Address, temporary bool, b gstack.PrimaryEndpointBehavior, readOnly bool,
) gstack.AddressEndpoint {
	if temporary {
		return &e.every
	}
	return e.AddressableEndpoint.AcquireAssignedAddress(a, false, b, readOnly)
}

// HandlePacket is that of gVisor's NetworkEndpoint. The frame reader has judged the packet (inspect).
func (e *ipEndpoint) HandlePacket(pkt *gstack.PacketBuffer) {
	if e.nic.Promiscuous() && e.parse(pkt) {
		pkt.NICID = e.nic.ID()
		e.up.DeliverTransportPacket(header.TCPProtocolNumber, pkt)
		return
	}
	e.NetworkEndpoint.HandlePacket(pkt)
}

// WritePacket is that of gVisor's NetworkEndpoint: it puts the IP header before a TCP segment, as gVisor would, and writes it.
// gVisor's endpoint asks its packet filter on the way, twice, and the locks of the stack and of the filter's tables, which all
// connections have in common. What must be cut into fragments is left to it.
func (e *ipEndpoint) WritePacket(r *gstack.Route, h gstack.NetworkHeaderParams, pkt *gstack.PacketBuffer) tcpip.Error {
	n, proto := pkt.Size(), e.NetworkProtocolNumber()
	hdr, most := ip6HeaderLen, math.MaxUint16
	if proto == header.IPv4ProtocolNumber {
		hdr, most = ip4HeaderLen, math.MaxUint16-ip4HeaderLen
	}
	if h.Protocol != header.TCPProtocolNumber || h.ExperimentOptionValue != 0 || r.Loop() != gstack.PacketOut || n > most ||
		pkt.GSOOptions.Type == gstack.GSONone && hdr+n > int(e.l.mtu) {
		return e.NetworkEndpoint.WritePacket(r, h, pkt)
	}
	if b := pkt.NetworkHeader().Push(hdr); proto == header.IPv4ProtocolNumber {
		f := header.IPv4Fields{
			TotalLength: uint16(hdr + n), TTL: h.TTL, TOS: h.TOS, Protocol: protoTCP,
			SrcAddr: r.LocalAddress(), DstAddr: r.RemoteAddress(),
		}
		if h.DF {
			f.Flags = header.IPv4FlagDontFragment // the ID is then free (RFC 6864 4.1)
		} else {
			f.ID = uint16(1 + rand.IntN(math.MaxUint16))
		}
		ip := header.IPv4(b)
		ip.Encode(&f)
		ip.SetChecksum(^ip.CalculateChecksum())
	} else {
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: uint16(n), TransportProtocol: header.TCPProtocolNumber, HopLimit: h.TTL, TrafficClass: h.TOS,
			SrcAddr: r.LocalAddress(), DstAddr: r.RemoteAddress(),
		})
	}
	pkt.NetworkProtocolNumber = proto
	return e.l.WritePacket(pkt)
}

// parse takes the headers of a plain TCP segment off, as the frame reader has found them, and cuts off what follows the packet.
// When it reports false, the packet is as it was.
func (e *ipEndpoint) parse(pkt *gstack.PacketBuffer) bool {
	if e.l.plain == 0 {
		return false
	}
	proto, hdr := e.NetworkProtocolNumber(), ip6HeaderLen
	if proto == header.IPv4ProtocolNumber {
		hdr = ip4HeaderLen
		if !pkt.RXChecksumValidated {
			if b, ok := pkt.Data().PullUp(hdr); !ok || !header.IPv4(b).IsChecksumValid() {
				return false
			}
		}
	}
	pkt.NetworkHeader().Consume(hdr)
	pkt.NetworkProtocolNumber = proto
	pkt.Data().CapLength(e.l.plain - hdr)
	parse.TCP(pkt) // there are enough bytes for its header
	return true
}

// everyAddress is the state of every address: it is ours, and there is nothing to count, expire or remove.
type everyAddress struct {
	prefix tcpip.AddressWithPrefix
	subnet tcpip.Subnet
}

var _ gstack.AddressEndpoint = (*everyAddress)(nil)

// AddressWithPrefix names no address: gVisor asks only to learn whether the other end is the subnet's broadcast address,
// which a subnet of one address does not have.
func (a *everyAddress) AddressWithPrefix() tcpip.AddressWithPrefix { return a.prefix }

func (a *everyAddress) Subnet() tcpip.Subnet                        { return a.subnet }
func (a *everyAddress) IsAssigned(bool) bool                        { return true }
func (a *everyAddress) TryIncRef() bool                             { return true }
func (a *everyAddress) DecRef()                                     {}
func (a *everyAddress) GetKind() gstack.AddressKind                 { return gstack.Temporary }
func (a *everyAddress) SetKind(gstack.AddressKind)                  {}
func (a *everyAddress) ConfigType() gstack.AddressConfigType        { return gstack.AddressConfigStatic }
func (a *everyAddress) Deprecated() bool                            { return false }
func (a *everyAddress) SetDeprecated(bool)                          {}
func (a *everyAddress) Lifetimes() gstack.AddressLifetimes          { return gstack.AddressLifetimes{} }
func (a *everyAddress) SetLifetimes(gstack.AddressLifetimes)        {}
func (a *everyAddress) Temporary() bool                             { return true }
func (a *everyAddress) RegisterDispatcher(gstack.AddressDispatcher) {}
