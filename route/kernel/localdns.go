package kernel

import (
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Docker gives the containers of a network that the user has made the name server 127.0.0.11. Its rules in the container
// lead port 53 of this address to a socket of the Docker daemon, which asks the world from the host: past the steering of
// the container. With LocalDNS, these questions get another destination before Docker's rules see them, and leave by the
// TUN like those to any other server. Whatever else goes to the address is refused: a connection that Docker's rules
// have translated before, or a program that asks the daemon's own port.
//
// The packets have a loopback source, for which nothing but route_localnet of the TUN makes room.

// The priorities of our chains: before those of Docker, which are -100 (dstnat) and 100 (srcnat).
const (
	prioDNAT = -110
	prioSNAT = 90
)

// localDNSChains adds the chains that translate the addresses.
func (c *Config) localDNSChains(t *nfTable) {
	tun, ok := c.tun4()
	if !c.LocalDNS.Is4() || !c.DNSServer.Is4() || !ok {
		return
	}
	out := t.chain(&nfChain{name: "dns_output", kind: "nat", hook: unix.NF_INET_LOCAL_OUT, prio: prioDNAT})
	for _, p := range []uint8{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		out.add(daddr(hostPrefix(c.LocalDNS)), dport(p, PortRange{53, 53}), translate("dnat", expr.NATTypeDestNAT, c.DNSServer))
	}
	post := t.chain(&nfChain{name: "dns_postrouting", kind: "nat", hook: unix.NF_INET_POST_ROUTING, prio: prioSNAT})
	post.add(oif(c.TUN, true), daddr(hostPrefix(c.DNSServer)), translate("snat", expr.NATTypeSourceNAT, tun))
}

// refuseLocalDNS adds the rule against what goes to the address itself.
func (c *Config) refuseLocalDNS(out *nfChain) {
	if c.LocalDNS.Is4() {
		out.add(daddr(hostPrefix(c.LocalDNS)), count(countDNS), goTo("refuse"))
	}
}

// tun4 returns the IPv4 address of the TUN.
func (c *Config) tun4() (netip.Addr, bool) {
	for _, a := range c.TUNAddrs {
		if a.Is4() {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// translate gives a flow another destination or source.
func translate(word string, kind expr.NATType, to netip.Addr) term {
	return term{word + " ip to " + to.String(), []expr.Any{
		&expr.Immediate{Register: 1, Data: to.AsSlice()},
		&expr.NAT{Type: kind, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}}
}

// routeLocalnet lets packets with a loopback source into the TUN, and their answers out of it. The setting is of our own
// device and disappears with it.
func (h *Host) routeLocalnet() {
	if !h.c.LocalDNS.Is4() {
		return
	}
	if err := writeSysctl("net/ipv4/conf/"+h.c.TUN+"/route_localnet", "1"); err != nil {
		h.say("localdns", "names asked of "+h.c.LocalDNS.String()+" are refused", "err", err)
	}
}
