package flow

import "net/netip"

// Pool4 and Pool6 are the ranges that viasocks itself uses: for the addresses of the TUN and, by default, for those
// that stand for names. This is the only place that defines them. The IPv4 range is that of RFC 2544 for benchmarks,
// which is not routed on the Internet. The IPv6 range is a unique local address (RFC 4193), so a name with addresses
// of both families is reached by IPv4 (RFC 6724: labels), which more proxies can carry.
var (
	Pool4 = netip.MustParsePrefix("198.18.0.0/15")
	Pool6 = netip.MustParsePrefix("fd76:6961:736f:636b::/64")
)

// PoolReserve is how many addresses at the beginning of a range stand for no name. The TUN's addresses are among
// them.
const PoolReserve = 256

// Ours contains all of these ranges.
var Ours = [...]netip.Prefix{Pool4, Pool6}

// The addresses of the TUN and of its far end. Programs find their name server at the far end. ICMP errors also come
// from there if the destination that they are about cannot be the source of a packet.
var (
	TUN4     = netip.MustParseAddr("198.18.0.1")
	TUN6     = netip.MustParseAddr("fd76:6961:736f:636b::1")
	Gateway4 = netip.MustParseAddr("198.18.0.2")
	Gateway6 = netip.MustParseAddr("fd76:6961:736f:636b::2")
	// Outside4 and Outside6 are what a program in its own namespace sees as the source of connections to its published
	// ports. They are addresses of its loopback interface.
	Outside4 = netip.MustParseAddr("198.18.0.3")
	Outside6 = netip.MustParseAddr("fd76:6961:736f:636b::3")
)

// SSDP is where programs search for devices of UPnP, such as gateways.
var SSDP = netip.MustParseAddrPort("239.255.255.250:1900")

// metadata is the address at which clouds tell a machine about itself, including credentials. Behind a proxy it would
// be the proxy's machine.
var metadata = netip.MustParseAddr("169.254.169.254")

// OneHost reports whether a has the form of the address of a single host that packets on a wire can come from. It is
// not unspecified, loopback, multicast or broadcast, not in 0.0.0.0/8 ("this network", RFC 1122, section 3.2.1.3) or
// 240.0.0.0/4 (reserved), and not an IPv4 address in IPv6 form.
func OneHost(a netip.Addr) bool {
	if a.Is4() {
		b := a.As4()
		return b[0] != 0 && b[0] != 127 && b[0] < 224
	}
	return a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.Is4In6()
}

// IsOurs reports whether a is in one of our own ranges.
func IsOurs(a netip.Addr) bool {
	for _, p := range Ours {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// CanBePeer reports whether a can be the address of a peer beyond a proxy. It is the single definition for the
// destinations of TCP and UDP, for the relays that a proxy names, and for the sources of datagrams from a relay.
func CanBePeer(a netip.Addr) bool {
	return OneHost(a) && !IsOurs(a) && a != metadata
}
