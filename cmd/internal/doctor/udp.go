package doctor

import (
	"context"
	"fmt"

	"github.com/viasocks/viasocks/cmd/internal/conform"
	"github.com/viasocks/viasocks/socks"
)

// quicSize is the minimum size of the first datagrams of QUIC (RFC 9000, section 14). dnsSize is the maximum size of a
// resolver's answer by UDP.
const quicSize, dnsSize = 1200, 1400

// udp sends datagrams to the peer and asks for answers, both from the same socket of the peer and from others.
func (p *proxy) udp(ctx context.Context, x *peer) []Finding {
	if !x.ends.TCP.IsValid() {
		return []Finding{
			{Check: "UDP", Level: NotTested, Found: "This host cannot look up the peer's name.", Do: "--peer with an address"},
		}
	}
	a := x.probe.Association(ctx)
	if f, ok := p.noUDP(a); !ok {
		return []Finding{f}
	}
	if p.server.UDPOverTCP() {
		return []Finding{
			{Check: "UDP", Level: OK, Found: "The proxy takes UDP over TCP; whether datagrams come back was not tested."},
		}
	}
	main := socks.AddrFrom(x.ends.UDP[0][0])
	ok, source := x.probe.Echo(ctx, main)
	if !ok {
		f := Finding{
			Check: "UDP",
			Level: Fault,
			Found: fmt.Sprintf("The proxy offers UDP (at %s), but no datagram comes back from the peer.", a.Bound),
			Means: "aria2's DHT and UDP trackers, and QUIC, wait in vain.",
			Do: "open the UDP ports of the proxy's relay in the firewalls between, and UDP " + fmt.Sprint(main.Port) +
				" of the peer",
		}
		if p.a.h.up != nil {
			f.Level, f.Found = NotTested, "'viasocks up' is running, and its filter lets out only datagrams of its own."
			f.Do = "viasocks down, then this command again"
			f.Means = ""
		}
		return []Finding{f}
	}
	first := Finding{Check: "UDP", Level: OK, Found: "Datagrams travel both ways."}
	if !source {
		first.Level, first.Found = Warning, "Datagrams travel both ways, but the proxy does not say truly who sent them."
		first.Means = "aria2's DHT and UDP trackers drop answers from an address that they did not ask."
	}
	return append([]Finding{first}, together(
		func() []Finding { return []Finding{mappingFinding(x.probe.Mapping(ctx), x.ends.UDP[1][0].IsValid())} },
		func() []Finding { return []Finding{filterFinding(x.probe.Filtering(ctx), x.ends.UDP[1][0].IsValid())} },
		func() []Finding { return []Finding{sizeFinding(x.probe.Sizes(ctx))} },
		func() []Finding { return x.udp6(ctx) },
	)...)
}

func mappingFinding(n conform.NAT, both bool) Finding {
	f := Finding{Check: "UDP mapping", Level: OK}
	switch n {
	case conform.EndpointIndependent:
		f.Found = "A program keeps one address at the proxy, whatever it sends to (endpoint-independent mapping)."
		if !both {
			f.Found = "A program keeps one address at the proxy for two ports of the peer; " +
				"a second --peer address would tell more."
		}
		f.Means = "Good for DHT, uTP and calls."
	case conform.AddressDependent, conform.PortDependent:
		f.Level, f.Found = Warning, fmt.Sprintf("A program has another address at the proxy for each destination "+
			"(%s mapping).", n)
		f.Means = "Other BitTorrent clients cannot send to the address that a DHT or a tracker has of aria2; calls need a " +
			"TURN server. QUIC and DNS work."
		f.Do = "use a proxy with endpoint-independent mapping (dante, sing-box, hev-socks5-server) for BitTorrent"
	default:
		f.Level, f.Found = NotTested, "Datagrams were lost meanwhile."
	}
	return f
}

func filterFinding(n conform.NAT, both bool) Finding {
	f := Finding{Check: "UDP filtering", Level: OK}
	switch {
	case n == conform.EndpointIndependent:
		f.Found, f.Means = "Datagrams from strangers reach the program (endpoint-independent filtering).", "DHT nodes and "+
			"BitTorrent peers can begin."
	case n == conform.AddressDependent && !both:
		f.Found = "Datagrams from another port of a host that was written to reach the program; " +
			"a second --peer address would tell about strangers."
	case n == conform.AddressDependent, n == conform.PortDependent:
		f.Level, f.Found = Warning, fmt.Sprintf("Only answers reach the program, no datagrams from strangers (%s filtering).", n)
		f.Means = "aria2's DHT works, but is asked by nobody; BitTorrent peers cannot begin by uTP. QUIC and DNS work."
	default:
		f.Level, f.Found = NotTested, "Datagrams were lost meanwhile."
	}
	return f
}

func sizeFinding(up, down int) Finding {
	f := Finding{
		Check: "UDP size",
		Level: OK,
		Found: fmt.Sprintf("Datagrams of up to %d bytes reach the peer, and of %d come back.", up, down),
	}
	switch least := min(up, down); {
	case up == 0:
		f.Level, f.Found = NotTested, "Datagrams were lost meanwhile."
	case least < quicSize:
		f.Level, f.Means = Warning, "QUIC (HTTP/3) does not work: it needs 1200 bytes. Browsers use TCP in its place. DHT works."
		f.Do = "look for a small MTU on the way to the proxy: 'packet size' above"
	case least < dnsSize:
		f.Means = "Enough for QUIC, DHT and most answers of DNS."
	default:
		f.Means = "Enough for QUIC, DHT, DNS and uTP."
	}
	return f
}

func (x *peer) udp6(ctx context.Context) []Finding {
	if !x.six.IsValid() || x.six == x.ends.TCP {
		return nil
	}
	if ok, _ := x.probe.Echo(ctx, socks.AddrFrom(x.six)); ok {
		return []Finding{{Check: "UDP, IPv6", Level: OK, Found: "Datagrams travel to the peer's IPv6 address and back."}}
	}
	return []Finding{{Check: "UDP, IPv6", Level: Warning, Found: "No datagram comes back from the peer's IPv6 address.",
		Means: "aria2's IPv6 DHT (--enable-dht6) finds nobody."}}
}
