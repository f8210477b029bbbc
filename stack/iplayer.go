package stack

import (
	"math"
	"math/rand/v2"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/header/parse"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// gVisor's IP endpoints keep a table of their own addresses. In a stack that accepts every address, each destination
// in use gets a temporary entry, and the cost of a packet depends on the number of entries. IPv4 compares an address
// that is not in the table with all that are, because it could be the broadcast address of one of their subnets. Both
// families keep the entries in a list that is searched when an entry is removed.
//
// The IP layer in this file precedes gVisor's endpoint and has one state for all addresses. Nothing is looked up,
// added or removed, and gVisor's table stays empty. It also passes a plain TCP segment directly to the transport
// layer. All other packets go through gVisor's endpoint: fragments, options and extension headers, ICMP, and
// malformed packets.

// ipProtocol is gVisor's IPv4 or IPv6 with an ipEndpoint instead of gVisor's endpoint.
type ipProtocol struct {
	gstack.NetworkProtocol
	l *link
}

// overIP wraps the factory of gVisor's IPv4 or IPv6 for l.
func (l *link) overIP(f gstack.NetworkProtocolFactory) gstack.NetworkProtocolFactory {
	return func(ns *gstack.Stack) gstack.NetworkProtocol { return ipProtocol{f(ns), l} }
}

// NewEndpoint implements gVisor's NetworkProtocol.
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

// ipEndpoint is the IP layer of one family. The two embedded interfaces are gVisor's endpoint.
type ipEndpoint struct {
	gstack.NetworkEndpoint
	gstack.AddressableEndpoint

	nic   gstack.NetworkInterface
	up    gstack.TransportDispatcher
	l     *link
	every everyAddress
}

// AcquireAssignedAddress implements gVisor's AddressableEndpoint. Where any address may be used, all share one state.
func (e *ipEndpoint) AcquireAssignedAddress(
	a tcpip.Address, temporary bool, b gstack.PrimaryEndpointBehavior, readOnly bool,
) gstack.AddressEndpoint {
	if temporary {
		return &e.every
	}
	return e.AddressableEndpoint.AcquireAssignedAddress(a, false, b, readOnly)
}

// HandlePacket implements gVisor's NetworkEndpoint. The frame reader has already inspected the packet.
func (e *ipEndpoint) HandlePacket(pkt *gstack.PacketBuffer) {
	if e.nic.Promiscuous() && e.parse(pkt) {
		pkt.NICID = e.nic.ID()
		e.up.DeliverTransportPacket(header.TCPProtocolNumber, pkt)
		return
	}
	e.NetworkEndpoint.HandlePacket(pkt)
}

// WritePacket implements gVisor's NetworkEndpoint. It adds the IP header to a TCP segment, as gVisor would, and
// writes the packet. gVisor's endpoint would consult its packet filter twice and take the locks of the stack and of
// the filter's tables, which all connections share. Packets that must be fragmented are left to gVisor.
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
			f.Flags = header.IPv4FlagDontFragment // the ID is then arbitrary (RFC 6864, section 4.1)
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

// parse removes the headers of a plain TCP segment, as found by the frame reader, and cuts off what follows the
// packet. If it returns false, the packet is unchanged.
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

// everyAddress is the state of every address: it is our own, and there is nothing to count, expire or remove.
type everyAddress struct {
	prefix tcpip.AddressWithPrefix
	subnet tcpip.Subnet
}

var _ gstack.AddressEndpoint = (*everyAddress)(nil)

// AddressWithPrefix returns a subnet of one address. gVisor uses it only to find out whether the other end is the
// subnet's broadcast address, which such a subnet does not have.
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
