package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Reasons for refusing packets, which are also the names of the filter's counters.
const (
	countBound     = "refused_output"      // would leave by another device than the TUN: bound sockets, foreign marks
	countDNS       = "refused_dns"         // the same, to port 53
	countMulticast = "refused_multicast"   // multicast and broadcast
	countDead      = "refused_no_daemon"   // to the TUN while no daemon reads it
	countForward   = "refused_forward"     // forwarded by this host
	countPost      = "refused_postrouting" // rerouted after the other chains
	countLAN       = "refused_lan_to_tun"  // from outside to the TUN's address
	countARP       = "refused_arp"
	countFrame     = "refused_frame" // raw frames, with Strict
	countForgot    = "refused_full"  // the filter had no room to remember it

	// signBridge counts nothing. Its presence shows that a table of the family bridge is ours.
	signBridge = "viasocks_bridge"
)

const (
	guardSet   = "guard"
	prioBridge = -300
	prioMangle = -150
	prioLast   = 300
)

// concat returns nft(8)'s number for a key of several fields.
func concat(types ...uint32) (t uint32) {
	for _, x := range types {
		t = t<<6 | x
	}
	return t
}

// Type numbers of nft(8).
const (
	typeIP4, typeIP6, typeProto, typePort, typeIfname = 7, 8, 12, 13, 41
)

// lanNet is a private network on a device.
type lanNet struct {
	dev    string
	prefix netip.Prefix
	guest  bool // contains only containers and guests of this host, and is reached past the proxy whatever the LANMode
}

// filterState is the state of the host on which the filter depends, in addition to the configuration.
type filterState struct {
	lan     []lanNet
	near    []lanNet // see links
	ends    []Endpoint
	kept    []Tuple  // connections that were open before, see Host.keep
	guard   bool     // packets of programs may go to the TUN
	devices []string // with Strict: devices that lead out of the host
	router  bool     // this host sends router advertisements
	arp     bool     // the kernel supports the family arp
	bridge  bool     // the kernel supports the family bridge
	wasZero bool     // src_valid_mark was 0 before we changed it; see the constant wasZero

	noSocket bool                // the kernel has no nftables socket expression
	memory   map[string][]nfElem // what the filter itself has recorded, by set, for the table that replaces it
}

// endpointSets returns the elements of the four sets of endpoints: by family, without a port (any4, any6) and with
// one.
func endpointSets(ends []Endpoint) (any4, any6, set4, set6 []nfElem) {
	seen := map[string]bool{}
	for _, e := range ends {
		a := e.Addr.Addr().Unmap().WithZone("")
		protos := []uint8{e.Proto}
		if e.Proto == 0 {
			protos = []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP}
		}
		for _, p := range protos {
			key := append([]byte{p, 0, 0, 0}, a.AsSlice()...)
			text := protoName(p) + " . " + a.String()
			set := &any4
			switch {
			case e.Addr.Port() == 0 && a.Is6():
				set = &any6
			case e.Addr.Port() != 0:
				key = append(append(key, be16(e.Addr.Port())...), 0, 0)
				text += fmt.Sprintf(" . %d", e.Addr.Port())
				if set = &set4; a.Is6() {
					set = &set6
				}
			}
			if !a.IsValid() || seen[string(key)] {
				continue
			}
			seen[string(key)] = true
			*set = append(*set, nfElem{key: key, text: text})
		}
	}
	return any4, any6, set4, set6
}

// tupleSets returns the keys, local end first, of the connections that this host opened (out), or of the others.
func tupleSets(kept []Tuple, out bool) (set4, set6 []nfElem) {
	seen := map[Tuple]bool{}
	for _, k := range kept {
		l, r := k.Local.Addr().Unmap().WithZone(""), k.Remote.Addr().Unmap().WithZone("")
		if k.Out != out || seen[k] || !l.IsValid() || l.Is4() != r.Is4() {
			continue
		}
		seen[k] = true
		key := append([]byte{k.Proto, 0, 0, 0}, l.AsSlice()...)
		key = append(append(key, be16(k.Local.Port())...), 0, 0)
		key = append(key, r.AsSlice()...)
		key = append(append(key, be16(k.Remote.Port())...), 0, 0)
		e := nfElem{
			key:  key,
			text: fmt.Sprintf("%s . %s . %d . %s . %d", protoName(k.Proto), l, k.Local.Port(), r, k.Remote.Port()),
		}
		if l.Is4() {
			set4 = append(set4, e)
		} else {
			set6 = append(set6, e)
		}
	}
	return set4, set6
}

func keptSets(kept []Tuple) (sets []*nfSet) {
	for _, name := range []string{"kept", "old"} {
		set4, set6 := tupleSets(kept, name == "old")
		sets = append(
			sets,
			&nfSet{
				name:    name + "4",
				keyText: "inet_proto . ipv4_addr . inet_service . ipv4_addr . inet_service",
				keyType: concat(typeProto, typeIP4, typePort, typeIP4, typePort),
				keyLen:  20,
				elems:   set4,
			},
			&nfSet{
				name:    name + "6",
				keyText: "inet_proto . ipv6_addr . inet_service . ipv6_addr . inet_service",
				keyType: concat(typeProto, typeIP6, typePort, typeIP6, typePort),
				keyLen:  44,
				elems:   set6,
			},
		)
	}
	return sets
}

func (c *Config) ownSets(ends []Endpoint) []*nfSet {
	any4, any6, set4, set6 := endpointSets(ends)
	return []*nfSet{
		{
			name:    "own4",
			keyText: "inet_proto . ipv4_addr . inet_service",
			keyType: concat(typeProto, typeIP4, typePort),
			keyLen:  12,
			elems:   set4,
		},
		{
			name:    "own6",
			keyText: "inet_proto . ipv6_addr . inet_service",
			keyType: concat(typeProto, typeIP6, typePort),
			keyLen:  24,
			elems:   set6,
		},
		{name: "own4any", keyText: "inet_proto . ipv4_addr", keyType: concat(typeProto, typeIP4), keyLen: 8, elems: any4},
		{name: "own6any", keyText: "inet_proto . ipv6_addr", keyType: concat(typeProto, typeIP6), keyLen: 20, elems: any6},
	}
}

// aliveKey is stored in the guard set next to the TUN's name, for FailOpen. No device can have this name.
const aliveKey = "alive/"

// guardElems returns the elements that are renewed as long as there is a daemon.
func (c *Config) guardElems(steered bool) (out []nfElem) {
	if steered {
		out = append(out, nfElem{key: ifname(c.TUN), text: fmt.Sprintf("%q", c.TUN), timeout: c.Guard})
	}
	if c.FailOpen {
		out = append(out, nfElem{key: ifname(aliveKey), text: fmt.Sprintf("%q", aliveKey), timeout: c.Guard})
	}
	return out
}

// tables returns all of our tables.
func (c *Config) tables(st filterState) ([]*nfTable, error) {
	t, err := c.inetTable(st)
	if err != nil {
		return nil, err
	}
	out := []*nfTable{t}
	if st.arp {
		a := &nfTable{fam: unix.NFPROTO_ARP, name: c.NFTable, counters: []string{countARP}}
		in := a.chain(&nfChain{name: "input", kind: "filter", hook: 0, prio: 0})
		for _, addr := range c.TUNAddrs {
			if addr.Is4() {
				in.add(iif(c.TUN, false), arpTarget(addr), count(countARP), drop())
			}
		}
		// Before the kernel answers a request, it looks up the way to the neighbour's address, as for a packet. With
		// rp_filter=1, that way must lead through the device of the request. The mark leads the look-up past the TUN.
		in.add(setMetaMark(c.Marks, c.Marks.Own))
		out = append(out, a)
	}
	if st.bridge {
		out = append(out, c.bridgeTable())
	}
	if c.Strict {
		out = append(out, c.netdevTable(st))
	}
	return out, nil
}

func (c *Config) inetTable(st filterState) (*nfTable, error) {
	t := &nfTable{
		fam:      unix.NFPROTO_INET,
		name:     c.NFTable,
		counters: []string{countBound, countDNS, countMulticast, countDead, countForward, countPost, countLAN, countForgot},
	}
	if st.wasZero {
		t.counters = append(t.counters, wasZero)
	}
	guard := &nfSet{
		name:    guardSet,
		keyText: "ifname",
		keyType: typeIfname,
		keyLen:  unix.IFNAMSIZ,
		timeout: true,
		elems:   c.guardElems(st.guard),
	}
	t.sets = append(append(c.ownSets(st.ends), guard), keptSets(st.kept)...)
	for _, s := range c.memorySets() {
		s.elems = st.memory[s.name]
		t.sets = append(t.sets, s)
	}
	t.sets = append(t.sets, c.liveSets()...)
	if err := c.markChains(t, st); err != nil {
		return nil, err
	}
	c.refuseChains(t, st)
	dhcpChain(t, st)
	c.outputChain(t)
	c.forwardChain(t)
	c.postChain(t)
	c.localDNSChains(t)
	return t, nil
}

// outputChain adds the chain that refuses packets of this host.
func (c *Config) outputChain(t *nfTable) {
	out := t.chain(&nfChain{name: "output", kind: "filter", hook: unix.NF_INET_LOCAL_OUT, prio: prioLast})
	c.failOpen(out)
	c.refuseLocalDNS(out)
	out.add(oif("lo", true), accept())
	out.add(oifSet(guardSet), accept())
	// What was marked at priority -150 has been rerouted, but this hook still sees the former device. Therefore pass
	// comes first. What was rerouted into the TUN is checked again in postrouting.
	if c.outranks() || len(c.Straight) > 0 {
		out.add(metaMark(c.Marks, c.Marks.Captured, true), holds(guardSet, c.TUN), accept())
	}
	if c.Opens {
		out.add(metaMark(c.Marks, c.Marks.Returned, true), holds(guardSet, c.TUN), accept())
	}
	out.add(jump("pass"))
	out.add(isProto(unix.IPPROTO_UDP), jump("dhcp"))
	out.add(append(c.dhcpRerouted(), accept())...)
	out.add(oif(c.TUN, true), count(countDead), goTo("refuse"))
	out.add(daddrType("multicast", unix.RTN_MULTICAST), count(countMulticast), goTo("refuse"))
	out.add(daddrType("broadcast", unix.RTN_BROADCAST), count(countMulticast), goTo("refuse"))
	out.add(notProto(unix.IPPROTO_TCP), jump("speak")) // as while the host is closed and there is no TUN
	for _, p := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		out.add(dport(p, PortRange{53, 53}), count(countDNS), goTo("refuse"))
	}
	out.add(count(countBound), goTo("refuse"))
}

// forwardChain adds the chain that refuses forwarded packets.
func (c *Config) forwardChain(t *nfTable) {
	fwd := t.chain(&nfChain{name: "forward", kind: "filter", hook: unix.NF_INET_FORWARD, prio: prioLast})
	c.failOpen(fwd)
	fwd.add(metaMark(c.Marks, c.Marks.Bridged, true), accept())
	// A flow of our own sockets that is forwarded is an answer to an address that this host has lost. Without this
	// rule, the host and its router would send it to each other until its TTL is used up.
	fwd.add(ctMark(c.Marks, c.Marks.Own, true), count(countForward), drop())
	// The same holds for what comes out of the TUN: only those get it who have sent something into it by this host.
	for _, v6 := range []bool{false, true} {
		fwd.add(iif(c.TUN, true), forwardedFrom(v6, false), accept())
	}
	fwd.add(iif(c.TUN, true), inProto("fwd_from_full"), accept())
	if c.Opens { // a published port of this host, see openedIn
		fwd.add(iif(c.TUN, true), metaMark(c.Marks, c.Marks.Returned, true), accept())
	}
	fwd.add(iif(c.TUN, true), count(countForward), drop())
	fwd.add(oif(c.TUN, true), jump("fwd_note"))
	fwd.add(isProto(unix.IPPROTO_UDP), oif(c.TUN, true), jump("fwd_speak"))
	fwd.add(oifSet(guardSet), accept())
	fwd.add(jump("pass"))
	fwd.add(oif(c.TUN, true), count(countDead), goTo("refuse"))
	fwd.add(isProto(unix.IPPROTO_UDP), jump("fwd_speak"))
	fwd.add(count(countForward), goTo("refuse"))
}

// postChain adds the chain that drops what was rerouted after the other two. No error can be sent from here, and none is
// needed: what they reject does not get here.
func (c *Config) postChain(t *nfTable) {
	post := t.chain(&nfChain{name: "postrouting", kind: "filter", hook: unix.NF_INET_POST_ROUTING, prio: prioLast})
	c.failOpen(post)
	post.add(metaMark(c.Marks, c.Marks.Bridged, true), accept())
	post.add(oif("lo", true), accept())
	post.add(oif(c.TUN, true), accept())
	post.add(iif(c.TUN, true), accept()) // what is carried for containers and guests
	post.add(jump("pass"))
	post.add(isProto(unix.IPPROTO_UDP), jump("dhcp"))
	post.add(count(countPost), drop())
}

// failOpen adds a rule that opens a chain if nothing renews the guard.
func (c *Config) failOpen(ch *nfChain) {
	if c.FailOpen {
		ch.add(lapsed(guardSet, aliveKey), accept())
	}
}

// refuseChains adds the chains pass, with what may pass, and refuse, which answers the rest.
func (c *Config) refuseChains(t *nfTable, st filterState) {
	m := c.Marks
	lan := t.chain(&nfChain{name: "lan"})
	for _, n := range c.included(st.lan) {
		lan.add(daddr(n), back())
	}
	for _, n := range st.lan {
		if n.guest || c.LAN == LANDirect {
			lan.add(oif(n.dev, true), daddr(n.prefix), accept())
		}
	}
	pass := t.chain(&nfChain{name: "pass"})
	pass.add(ctMark(m, m.Own, true), accept())
	if c.needDirect() {
		pass.add(metaMark(m, m.Direct, true), accept())
		pass.add(ctMark(m, m.Direct, true), accept()) // another program has overwritten our mark
	}
	if c.keepsInbound() {
		pass.add(metaMark(m, m.Inbound, true), ctMark(m, m.Inbound, true), accept())
		c.passCame(pass)
	}
	hostTerms(pass, st)
	c.passExcluded(t, pass)
	for _, p := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		pass.add(dport(p, PortRange{53, 53}), back())
	}
	if c.PortMap != 0 {
		pass.add(dport(unix.IPPROTO_UDP, c.portMap()), back())
	}
	// If an answer arrives after the program has closed its socket, the kernel sends the name server an error that
	// quotes the answer with the question in it. A server in a private network would receive that on its device.
	for _, v6 := range []bool{false, true} {
		pass.add(aboutAnswer(53, v6), count(countDNS), drop())
	}
	pass.add(daddrType("multicast", unix.RTN_MULTICAST), back())
	pass.add(daddrType("broadcast", unix.RTN_BROADCAST), back())
	pass.add(jump("lan"))

	// Measured: these errors end a connect() at once, for bound sockets too. For TCP over IPv6, an ICMPv6 error takes
	// a second or never arrives. Over IPv4 the true error arrives at once at non-blocking sockets; a blocking
	// connect() holds its socket while the error arrives, and sees it only after the first retransmission, a second
	// later.
	refuse := t.chain(&nfChain{name: "refuse"})
	refuse.add(term{"meta nfproto ipv6", isFamily(true)}, isProto(unix.IPPROTO_TCP), rejectReset())
	refuse.add(isProto(unix.IPPROTO_TCP), rejectICMPX("no-route", unix.NFT_REJECT_ICMPX_NO_ROUTE))
	refuse.add(rejectICMPX("admin-prohibited", unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED))
}

// hostTerms adds what a host needs on its own links: neighbour discovery.
func hostTerms(ch *nfChain, st filterState) {
	nd := []uint8{133, 135, 136} // router solicitation, neighbour solicitation and advertisement
	if st.router {
		nd = append(nd, 134)
	}
	for _, typ := range nd {
		ch.add(icmp6(typ, 255), accept())
	}
	for _, typ := range []uint8{131, 132, 143} { // multicast listener report, done, report v2
		ch.add(icmp6(typ, 1), accept())
	}
}

// bridgeTable marks frames that cross a bridge from one port to another. They do not belong to this host, but they
// reach the inet table if net.bridge.bridge-nf-call-iptables is 1, which docker and Kubernetes set, and with Strict
// the netdev table of the port on which they leave. The inet hooks cannot distinguish them from packets that this
// host routes back to the bridge they came from, which must not pass. The chain runs before br_netfilter passes the
// frame on (br_nf_forward, -1). A frame from another network namespace cannot carry the mark: the kernel clears it on
// the way.
func (c *Config) bridgeTable() *nfTable {
	t := &nfTable{fam: unix.NFPROTO_BRIDGE, name: c.NFTable, counters: []string{signBridge}}
	fwd := t.chain(&nfChain{name: "forward", kind: "filter", hook: unix.NF_INET_FORWARD, prio: prioBridge})
	fwd.add(setMetaMark(c.Marks, c.Marks.Bridged))
	return t
}

// netdevTable returns the table that sees each frame that leaves.
func (c *Config) netdevTable(st filterState) *nfTable {
	t := &nfTable{fam: unix.NFPROTO_NETDEV, name: c.NFTable, counters: []string{countFrame}}
	pass := t.chain(&nfChain{name: "pass"})
	pass.add(arpFrame(), accept())
	pass.add(metaMark(c.Marks, c.Marks.Bridged, true), accept())
	for _, v := range append(c.passing(), c.Marks.Captured) {
		pass.add(metaMark(c.Marks, v, true), accept())
	}
	hostTerms(pass, st)
	dhcpTerms(pass, st)
	exclude, _ := c.terms(c.Exclude, false)
	for _, x := range exclude {
		pass.add(x, accept())
	}
	for _, n := range st.lan {
		if n.guest {
			pass.add(oif(n.dev, true), daddr(n.prefix), accept())
		}
	}
	pass.add(count(countFrame), drop())
	for i, d := range st.devices {
		t.chain(&nfChain{name: fmt.Sprintf("egress%d", i), kind: "filter", hook: unix.NF_NETDEV_EGRESS, device: d}).
			add(goTo("pass"))
	}
	return t
}

func beU64(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}
