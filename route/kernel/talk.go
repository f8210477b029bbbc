package kernel

import (
	"slices"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// This file decides which end began a UDP conversation. A datagram from outside proves nothing: it may be forged. If
// it could begin a flow on the port of a program that uses the proxy, the program's own datagrams to that address
// would leave past the proxy as if they were answers. The filter therefore keeps these sets, without the help of any
// process:
//
//	spoke        local UDP ports that sent something on their own initiative that was for the TUN
//	spoke_proto  other protocols of which the host sent something for the TUN; UDP, if spoke was full
//	served4, 6   local ports and the peers that they answered directly: conntrack forgets those after half a minute, and
//	             a server that speaks first to such a peer still answers it
//	fwd_spoke4,6 addresses and ports of containers and guests that sent something for the TUN
//	fwd_full     UDP, if fwd_spoke4 or fwd_spoke6 was full
//	fwd_from4,6  addresses from which something was forwarded into the TUN, which alone get answers from there
//	fwd_from_full  the protocols of what was forwarded while fwd_from4 or fwd_from6 was full: all addresses get answers
//
// Ports in a spoke set get no direct answers. A datagram is checked when it arrives and when the answer leaves. With
// CarryInbound no port gets direct answers, but the sets are still filled, because the option may change while the
// host is steered.
//
// InboundPorts are an exception, because the user has declared them to be ports of servers. See serverPorts.

// How long, and how much, the filter remembers. A tracker is asked every half hour; a peer that was answered keeps
// its address translation for some minutes. There are 65,535 ports; the kernel removes expired elements within a
// second.
const (
	spokeFor   = time.Hour
	servedFor  = 10 * time.Minute
	spokeSize  = 1 << 17
	servedSize = 1 << 16
	protoSize  = 512
)

// memorySets returns the sets that the filter itself fills.
func (c *Config) memorySets() []*nfSet {
	set := func(name, keyText string, keyType, keyLen uint32, size uint32, keep time.Duration) *nfSet {
		return &nfSet{name: name, keyText: keyText, keyType: keyType, keyLen: keyLen, dynamic: true, size: size, keep: keep}
	}
	return append(append(cameSets(), openedSets()...),
		set("spoke", "inet_service", typePort, 2, spokeSize, spokeFor),
		set("spoke_proto", "inet_proto", typeProto, 1, protoSize, spokeFor),
		set("served4", "inet_service . ipv4_addr . inet_service", concat(typePort, typeIP4, typePort), 12, servedSize, servedFor),
		set("served6", "inet_service . ipv6_addr . inet_service", concat(typePort, typeIP6, typePort), 24, servedSize, servedFor),
		set("fwd_spoke4", "ipv4_addr . inet_service", concat(typeIP4, typePort), 8, spokeSize, spokeFor),
		set("fwd_spoke6", "ipv6_addr . inet_service", concat(typeIP6, typePort), 20, spokeSize, spokeFor),
		set("fwd_from4", "ipv4_addr", typeIP4, 4, spokeSize, spokeFor),
		set("fwd_from6", "ipv6_addr", typeIP6, 16, spokeSize, spokeFor),
		set("fwd_from_full", "inet_proto", typeProto, 1, protoSize, spokeFor),
		set("fwd_full", "inet_proto", typeProto, 1, protoSize, spokeFor),
		set(dhcpSet, "ipv4_addr", typeIP4, 4, dhcpServers, dhcpKeep),
	)
}

// turned returns the mark for a flow that turns out not to be from outside. With Include it is evaluated like any
// other.
func (c *Config) turned() term {
	if !c.Include.empty() {
		return setCtMark(c.Marks, 0)
	}
	return setCtMark(c.Marks, c.Marks.Captured)
}

// inboundChains adds the chains that recognize traffic from outside. Which end speaks first proves nothing: the far
// end may also speak first in a connection that this host opened before `up` and that was not tracked. For TCP, a SYN
// is proof, and so is address translation, which is always tracked.
func (c *Config) inboundChains(t *nfTable) {
	m := c.Marks
	// An ICMP error, including one of our own filter, belongs to the flow that it is about, in the opposite
	// direction. It proves nothing.
	in := t.chain(&nfChain{name: "inbound"})
	in.add(ctRelated(), back())
	in.add(ctDNAT(), setCtMark(m, m.Inbound), back())
	in.add(tcpSYN(), setCtMark(m, m.Inbound))
	in.add(keptTuple("kept4", false, true), setCtMark(m, m.Inbound))
	in.add(keptTuple("kept6", true, true), setCtMark(m, m.Inbound))
	in.add(keptTuple("came4", false, true), setCtMark(m, m.Inbound))
	in.add(keptTuple("came6", true, true), setCtMark(m, m.Inbound))
	in.add(isProto(unix.IPPROTO_TCP), back())
	in.add(keptTuple("old4", false, true), back())
	in.add(keptTuple("old6", true, true), back())
	in.add(inPort("spoke", "dport"), setCtMark(m, m.Declined), back())
	in.add(inProto("spoke_proto"), setCtMark(m, m.Declined), back())
	in.add(setCtMark(m, m.Inbound))
	out := t.chain(&nfChain{name: "answer"})
	out.add(ctRelated(), back())
	out.add(isProto(unix.IPPROTO_TCP), back())
	out.add(keptTuple("old4", false, false), back())
	out.add(keptTuple("old6", true, false), back())
	out.add(setCtMark(m, m.Inbound))
}

// serverPorts adds the rules that take everything that arrives at a UDP port of InboundPorts for a request from
// outside, which is answered directly. They do not check what the port has sent or which end began: the flow may have
// begun with a datagram that the port sent into the TUN. Flows of our own sockets and excluded flows do not change.
func (c *Config) serverPorts(t *nfTable, pre *nfChain) {
	if len(c.InboundPorts) == 0 {
		return
	}
	m := c.Marks
	ports := t.chain(&nfChain{name: "server_ports"})
	for _, r := range c.InboundPorts {
		ports.add(dport(unix.IPPROTO_UDP, r), setCtMark(m, m.Inbound), back())
	}
	for _, from := range c.inboundBy() {
		for _, v := range []uint32{0, m.Captured, m.Declined} {
			pre.add(append(slices.Clone(from), isProto(unix.IPPROTO_UDP), ctMark(m, v, true),
				daddrType("local", unix.RTN_LOCAL), jump("server_ports"))...)
		}
	}
}

// heardChain adds the rules that withdraw the mark of a datagram for which there was no socket. If a program opens
// the port a moment later and first sends to that address, this is not an answer. The next datagram is evaluated
// again.
func (c *Config) heardChain(t *nfTable, st filterState) {
	if st.noSocket {
		return
	}
	m := c.Marks
	heard := t.chain(&nfChain{name: "heard"})
	heard.add(socketTransparent(false), back())
	heard.add(socketTransparent(true), back())
	heard.add(setCtMark(m, m.Declined))
	t.chain(&nfChain{name: "input", kind: "filter", hook: unix.NF_INET_LOCAL_IN, prio: prioMangle}).
		add(isProto(unix.IPPROTO_UDP), ctMark(m, m.Inbound, true), ctNew(), jump("heard"))
}

// answerRules adds the rules of the output chain that decide what is an answer to the outside.
func (c *Config) answerRules(t *nfTable, out *nfChain) {
	m := c.Marks
	again := t.chain(&nfChain{name: "again"})
	again.add(servedPeer(false, false), setCtMark(m, m.Inbound))
	again.add(servedPeer(true, false), setCtMark(m, m.Inbound))
	serve := t.chain(&nfChain{name: "serve"})
	serve.add(servedPeer(false, true))
	serve.add(servedPeer(true, true))
	turn := t.chain(&nfChain{name: "turn"})
	// A SYN is never an answer: this host opens a connection, from the port and to the address of an apparent earlier
	// caller.
	turn.add(tcpSYN(), ctDirection(true), c.turned(), back())
	turn.add(isProto(unix.IPPROTO_TCP), back())
	for _, r := range c.InboundPorts {
		turn.add(sport(unix.IPPROTO_UDP, r), goTo("serve"))
	}
	turn.add(inPort("spoke", "sport"), c.turned(), back())
	turn.add(inProto("spoke_proto"), c.turned(), back())
	turn.add(goTo("serve"))

	out.add(isProto(unix.IPPROTO_UDP), ctDirection(false), ctMark(m, 0, true), ctNew(), jump("again"))
	out.add(ctMark(m, m.Inbound, true), jump("turn"))
	declined := t.chain(&nfChain{name: "declined"})
	declined.add(ctRelated(), back()) // the error of a closed port
	declined.add(c.turned())
	out.add(ctDirection(true), ctMark(m, m.Declined, true), jump("declined"))
}

// speakChains adds the chains that record which ports send something for the TUN on their own initiative. An answer
// records nothing; otherwise a server whose port got into the set by accident would never leave it.
func (c *Config) speakChains(t *nfTable) {
	speak := t.chain(&nfChain{name: "speak"})
	speak.add(ctDirection(true), back())
	speak.add(notePort("spoke"), back())
	speak.add(isProto(unix.IPPROTO_ICMP), back())
	speak.add(isProto(unix.IPPROTO_ICMPV6), back())
	speak.add(noteProto("spoke_proto"), back())
	speak.add(count(countForgot), drop())
	fwd := t.chain(&nfChain{name: "fwd_speak"})
	fwd.add(ctDirection(true), back())
	fwd.add(hostPort("fwd_spoke4", false, true), back())
	fwd.add(hostPort("fwd_spoke6", true, true), back())
	fwd.add(noteProto("fwd_full"), back())
	fwd.add(count(countForgot), drop())
	note := t.chain(&nfChain{name: "fwd_note"})
	note.add(forwardedFrom(false, true), back())
	note.add(forwardedFrom(true, true), back())
	note.add(noteProto("fwd_from_full"))
}

// forwardedAnswers adds the rules that withdraw the mark of what seems to be the answer of a container or guest whose
// port is published.
func (c *Config) forwardedAnswers(t *nfTable, pre *nfChain) {
	turn := t.chain(&nfChain{name: "fwd_turn"})
	turn.add(hostPort("fwd_spoke4", false, false), c.turned())
	turn.add(hostPort("fwd_spoke6", true, false), c.turned())
	turn.add(inProto("fwd_full"), c.turned())
	pre.add(isProto(unix.IPPROTO_UDP), ctDirection(true), ctMark(c.Marks, c.Marks.Inbound, true), jump("fwd_turn"))
}

// update returns the part of a rule that adds a key to a set, or extends its time in the set.
func update(set, key string, loads ...expr.Any) term {
	return term{"update @" + set + " { " + key + " }",
		append(loads, &expr.Dynset{SrcRegKey: 8, SetName: set, Operation: unix.NFT_DYNSET_OP_UPDATE})}
}

func loadPort(reg, offset uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}
}

// inPort looks up the source or destination port of a datagram.
func inPort(set, which string) term {
	offset := uint32(0)
	if which == "dport" {
		offset = 2
	}
	return term{"udp " + which + " @" + set,
		append(l4proto(unix.IPPROTO_UDP), loadPort(8, offset), &expr.Lookup{SourceRegister: 8, SetName: set})}
}

func notePort(set string) term {
	return update(set, "udp sport", append(l4proto(unix.IPPROTO_UDP), loadPort(8, 0))...)
}

func loadProto() expr.Any { return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 8} }

func inProto(set string) term   { return lookup(set, "meta l4proto", nil, loadProto()) }
func noteProto(set string) term { return update(set, "meta l4proto", loadProto()) }

// hostPort looks up the source of a datagram, or records it.
func hostPort(set string, v6, note bool) term {
	word, off, n := "ip", uint32(12), uint32(4)
	if v6 {
		word, off, n = "ip6", 8, 16
	}
	loads := append(isFamily(v6), l4proto(unix.IPPROTO_UDP)...)
	loads = append(loads,
		&expr.Payload{DestRegister: 8, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: n}, loadPort(8+n/4, 0))
	if note {
		return update(set, word+" saddr . udp sport", loads...)
	}
	return lookup(set, word+" saddr . udp sport", nil, loads...)
}

// forwardedFrom looks up the destination of what came out of the TUN, or records the source of what goes into it.
func forwardedFrom(v6, note bool) term {
	set, word, off, n := "fwd_from4", "ip", uint32(12), uint32(4)
	if v6 {
		set, word, off, n = "fwd_from6", "ip6", 8, 16
	}
	if !note {
		off += n
	}
	loads := append(isFamily(v6), &expr.Payload{DestRegister: 8, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: n})
	if note {
		return update(set, word+" saddr", loads...)
	}
	return lookup(set, word+" daddr", nil, loads...)
}

// servedPeer looks up the port and the peer of an outgoing datagram, or records them.
func servedPeer(v6, note bool) term {
	set, word, off, n := "served4", "ip", uint32(16), uint32(4)
	if v6 {
		set, word, off, n = "served6", "ip6", 24, 16
	}
	loads := append(isFamily(v6), l4proto(unix.IPPROTO_UDP)...)
	loads = append(loads, loadPort(8, 0),
		&expr.Payload{DestRegister: 9, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: n}, loadPort(9+n/4, 2))
	key := "udp sport . " + word + " daddr . udp dport"
	if note {
		return update(set, key, loads...)
	}
	return lookup(set, key, nil, loads...)
}

// socketTransparent matches packets that a socket on this host will receive: if there is none, the expression ends
// the rule.
func socketTransparent(yes bool) term {
	v := byte(0)
	if yes {
		v = 1
	}
	return term{"socket transparent " + string('0'+v),
		[]expr.Any{&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1}, cmp(expr.CmpOpEq, []byte{v})}}
}
