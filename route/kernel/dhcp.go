package kernel

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A DHCP client of this host reaches its servers by broadcast and multicast, at link-local addresses, in the networks
// that the host is connected to, and at an address from which DHCP has answered, where the host has no network, as in
// some clouds. Its port is privileged, so no other program has it. A server behind a relay is reached by broadcast
// when the client rebinds. Packets of containers and guests are forwarded, and have no such exception.
//
// An ip rule leads what an ordinary socket sends past the TUN (rules, atHost). The rule does not match what a raw socket
// sends, because the kernel looks up the route of such a packet without its ports. dhcpcd renews a lease in this way. The
// look-up leads its request into the TUN, and dhcpReroute leads it out again.

// How many servers the filter remembers, and for how long after their last answer: longer than half of a lease.
const (
	dhcpServers = 64
	dhcpKeep    = 8 * 24 * time.Hour
	dhcpSet     = "dhcp4"
)

var (
	dhcpTo4 = []netip.Prefix{netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("169.254.0.0/16")}
	dhcpTo6 = []netip.Prefix{netip.MustParsePrefix("ff02::1:2/128"), netip.MustParsePrefix("fe80::/10")}
)

// dhcpTerms adds the rules that let a client's packets pass.
func dhcpTerms(ch *nfChain, st filterState) {
	for _, p := range dhcpTo4 {
		ch.add(daddr(p), udpPorts(68, 67), accept())
	}
	for _, n := range st.near {
		ch.add(oif(n.dev, true), daddr(n.prefix), udpPorts(68, 67), accept())
	}
	for _, p := range dhcpTo6 {
		ch.add(daddr(p), udpPorts(546, 547), accept())
	}
}

// dhcpLearn adds the rules that record the servers that answer a client.
func dhcpLearn(pre *nfChain) {
	saddr := &expr.Payload{DestRegister: 8, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	pre.add(udpPorts(67, 68), update(dhcpSet, "ip saddr", append(isFamily(false), saddr)...))
}

func dhcpLearned() term {
	v6 := false
	return lookup(
		dhcpSet,
		"ip daddr",
		&v6,
		&expr.Payload{DestRegister: 8, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
	)
}

// udpPorts matches both ports of a datagram.
func udpPorts(src, dst uint16) term {
	return term{fmt.Sprintf("udp sport %d udp dport %d", src, dst), append(
		l4proto(unix.IPPROTO_UDP),
		&expr.Payload{
			DestRegister: 1,
			Base:         expr.PayloadBaseTransportHeader,
			Offset:       0,
			Len:          4,
		},
		cmp(expr.CmpOpEq, append(be16(src), be16(dst)...)),
	)}
}

// dhcpReroute adds the rules that lead the packets of a DHCP client past the TUN after the ip rules have led them into it.
// The mark only selects ip rules. The chain dhcp decides what may leave, and postrouting checks the device that the second
// look-up has chosen.
func (c *Config) dhcpReroute(t *nfTable, out *nfChain, st filterState) {
	ch := t.chain(&nfChain{name: "dhcp_reroute"})
	m := c.Marks
	for _, n := range st.near {
		ch.add(daddr(n.prefix), setMetaMark(m, m.Own), accept())
	}
	for _, p := range dhcpTo4 {
		ch.add(daddr(p), setMetaMark(m, m.Own), accept())
	}
	ch.add(dhcpLearned(), setMetaMark(m, m.Own), accept())
	out.add(oif(c.TUN, true), udpPorts(68, 67), jump(ch.name))
}

// dhcpRerouted matches what dhcpReroute has led past the TUN. The output hook still sees the TUN as its device.
func (c *Config) dhcpRerouted() []term {
	return []term{oif(c.TUN, true), metaMark(c.Marks, c.Marks.Own, true), udpPorts(68, 67)}
}

// dhcpChain adds the chain for packets that this host itself sends.
func dhcpChain(t *nfTable, st filterState) {
	ch := t.chain(&nfChain{name: "dhcp"})
	dhcpTerms(ch, st)
	ch.add(dhcpLearned(), udpPorts(68, 67), accept())
}
