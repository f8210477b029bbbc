package stack

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// gVisor's IPv4 endpoint looks up the source and the destination address of every packet. An address that its table does
// not hold is compared with every address that the table does hold, because it could be the broadcast address of one of
// their subnets. The table holds one temporary address for each destination in use, so beside 4,000 idle connections a
// round trip of one byte cost five times as much, and a new connection six walks of the table.
//
// So the table is given the addresses before gVisor asks for them: the program's own addresses for as long as they are in
// use, and the destination of a SYN until gVisor's connection holds it. The device is promiscuous and the stack spoofs, so
// owning an address changes nothing else: gVisor would have taken packets to it and sent packets from it anyway, and
// echo requests never reach gVisor. IPv6 has no broadcast addresses and does not walk.

// maxSources bounds how many addresses of the program are known: a host uses one or two. A forwarded network may have many
// more; the addresses that were used last are kept.
const maxSources = 8

// replaceEvery is how many packets from unknown addresses it takes, when all places are taken, until the address that was
// used longest ago gives way. It keeps packets from ever-changing addresses from costing more than the walk that they cause.
const replaceEvery = 256

// sources are the addresses of the program that gVisor's table has been given, the last used one first. Only the frame
// reader uses them.
type sources struct {
	known  [maxSources][4]byte
	n      int
	misses int
}

// source makes gVisor know the address that a TCP segment came from. The usual cost is one comparison.
func (e *engine) source(a [4]byte) {
	s := &e.sources
	if s.n != 0 && s.known[0] == a {
		return
	}
	for i := 1; i < s.n; i++ {
		if s.known[i] == a {
			s.known[0], s.known[i] = a, s.known[0]
			return
		}
	}
	if s.n == maxSources {
		if s.misses++; s.misses%replaceEvery != 0 {
			return
		}
		s.n--
		_ = e.ns.RemoveAddress(nicID, tcpip.AddrFrom4(s.known[s.n]))
	}
	// If the table has it as a destination for the moment, its next packet tries again.
	if e.addAddress(a) {
		s.known[s.n] = a
		s.n++
	}
}

// addAddress gives gVisor's table an address, and reports whether the table had no such permanent address before.
func (e *engine) addAddress(a [4]byte) bool {
	pa := tcpip.ProtocolAddress{
		Protocol:          header.IPv4ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(a), PrefixLen: 32},
	}
	return e.ns.AddProtocolAddress(nicID, pa, gstack.AddressProperties{PEB: gstack.NeverPrimaryEndpoint}) == nil
}

// holdAddress gives gVisor's table a destination until release is called. What still uses the address then keeps it.
// An address that is already in the table is left as it is.
func (e *engine) holdAddress(a [4]byte) (release func()) {
	if !e.addAddress(a) {
		return func() {}
	}
	return func() { _ = e.ns.RemoveAddress(nicID, tcpip.AddrFrom4(a)) }
}

// holdDestination is holdAddress for either family.
func (e *engine) holdDestination(a netip.Addr) (release func()) {
	if !a.Is4() {
		return func() {}
	}
	return e.holdAddress(a.As4())
}

// isSYN reports whether a TCP segment asks for a new connection. flags is the byte of the header that holds them.
func isSYN(flags byte) bool {
	return header.TCPFlags(flags)&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn
}
