package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// term is one part of an nftables rule, as text and for the kernel.
type term struct {
	text  string
	exprs []expr.Any
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func be16(v uint16) []byte     { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte     { return binary.BigEndian.AppendUint32(nil, v) }

func cmp(op expr.CmpOp, v []byte) expr.Any { return &expr.Cmp{Op: op, Register: 1, Data: v} }
func loadMeta(k expr.MetaKey) expr.Any     { return &expr.Meta{Key: k, Register: 1} }
func loadCt(k expr.CtKey) expr.Any         { return &expr.Ct{Key: k, Register: 1} }
func mask32(mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native32(mask), Xor: native32(xor)}
}

func opOf(eq bool) (string, expr.CmpOp) {
	if eq {
		return "==", expr.CmpOpEq
	}
	return "!=", expr.CmpOpNeq
}

func metaMark(m Marks, v uint32, eq bool) term {
	s, op := opOf(eq)
	return term{fmt.Sprintf("meta mark & %#08x %s %#08x", m.Mask, s, v),
		[]expr.Any{loadMeta(expr.MetaKeyMARK), mask32(m.Mask, 0), cmp(op, native32(v))}}
}

func ctMark(m Marks, v uint32, eq bool) term {
	s, op := opOf(eq)
	return term{fmt.Sprintf("ct mark & %#08x %s %#08x", m.Mask, s, v),
		[]expr.Any{loadCt(expr.CtKeyMARK), mask32(m.Mask, 0), cmp(op, native32(v))}}
}

func setMetaMark(m Marks, v uint32) term {
	return term{fmt.Sprintf("meta mark set meta mark & %#08x | %#08x", ^m.Mask, v),
		[]expr.Any{
			loadMeta(expr.MetaKeyMARK),
			mask32(^m.Mask, v),
			&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
		}}
}

func setCtMark(m Marks, v uint32) term {
	return term{fmt.Sprintf("ct mark set ct mark & %#08x | %#08x", ^m.Mask, v),
		[]expr.Any{loadCt(expr.CtKeyMARK), mask32(^m.Mask, v), &expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1}}}
}

func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

func iif(name string, eq bool) term {
	s, op := opOf(eq)
	return term{fmt.Sprintf("iifname %s %q", s, name), []expr.Any{loadMeta(expr.MetaKeyIIFNAME), cmp(op, ifname(name))}}
}

func oif(name string, eq bool) term {
	s, op := opOf(eq)
	return term{fmt.Sprintf("oifname %s %q", s, name), []expr.Any{loadMeta(expr.MetaKeyOIFNAME), cmp(op, ifname(name))}}
}

// etherType matches the family of a packet, in tables of any family.
func etherType(proto uint16) []expr.Any {
	return []expr.Any{loadMeta(expr.MetaKeyPROTOCOL), cmp(expr.CmpOpEq, be16(proto))}
}

func isFamily(v6 bool) []expr.Any {
	if v6 {
		return etherType(unix.ETH_P_IPV6)
	}
	return etherType(unix.ETH_P_IP)
}

// daddr matches a destination.
func daddr(p netip.Prefix) term {
	word, off, n := "ip", uint32(16), uint32(4)
	if p.Addr().Is6() {
		word, off, n = "ip6", 24, 16
	}
	e := append(isFamily(p.Addr().Is6()), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: off,
		Len: n})
	text := p.Addr().String()
	if p.Bits() < p.Addr().BitLen() {
		text = p.String()
		m := make([]byte, n)
		for i := range p.Bits() {
			m[i/8] |= 0x80 >> (i % 8)
		}
		e = append(e, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: m, Xor: make([]byte, n)})
	}
	return term{word + " daddr " + text, append(e, cmp(expr.CmpOpEq, p.Masked().Addr().AsSlice()))}
}

func l4proto(p uint8) []expr.Any {
	return []expr.Any{loadMeta(expr.MetaKeyL4PROTO), cmp(expr.CmpOpEq, []byte{p})}
}

func protoName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_ICMPV6:
		return "ipv6-icmp"
	}
	return "udp"
}

// dport matches destination ports of TCP or UDP, and sport matches source ports.
func dport(proto uint8, r PortRange) term { return portIn(proto, "dport", 2, r) }
func sport(proto uint8, r PortRange) term { return portIn(proto, "sport", 0, r) }

func portIn(proto uint8, word string, offset uint32, r PortRange) term {
	e := append(l4proto(proto), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2})
	if r.First == r.Last {
		return term{fmt.Sprintf("%s %s %d", protoName(proto), word, r.First), append(e, cmp(expr.CmpOpEq, be16(r.First)))}
	}
	return term{fmt.Sprintf("%s %s %d-%d", protoName(proto), word, r.First, r.Last),
		append(e, cmp(expr.CmpOpGte, be16(r.First)), cmp(expr.CmpOpLte, be16(r.Last)))}
}

func isProto(p uint8) term { return term{"meta l4proto " + protoName(p), l4proto(p)} }

func notProto(p uint8) term {
	return term{"meta l4proto != " + protoName(p), []expr.Any{loadMeta(expr.MetaKeyL4PROTO), cmp(expr.CmpOpNeq, []byte{p})}}
}

// icmp6 matches one type of ICMPv6 with a hop limit that no router would forward.
func icmp6(typ, hops uint8) term {
	e := append(
		isFamily(true),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1},
		cmp(expr.CmpOpEq, []byte{hops}),
	)
	e = append(e, l4proto(unix.IPPROTO_ICMPV6)...)
	e = append(
		e,
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		cmp(expr.CmpOpEq, []byte{typ}),
	)
	return term{fmt.Sprintf("ip6 hoplimit %d icmpv6 type %d", hops, typ), e}
}

// aboutAnswer matches ICMP errors of one family that report an unreachable destination and quote a datagram or
// segment from this port. The port follows the ICMP header (8 bytes) and the quoted IP header, which has no options.
func aboutAnswer(port uint16, v6 bool) term {
	word, proto, typ, offset := "icmp", uint8(unix.IPPROTO_ICMP), uint8(3), uint32(8+20)
	if v6 {
		word, proto, typ, offset = "icmpv6", unix.IPPROTO_ICMPV6, 1, 8+40
	}
	e := append(isFamily(v6), l4proto(proto)...)
	e = append(e, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		cmp(expr.CmpOpEq, []byte{typ}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		cmp(expr.CmpOpEq, be16(port)))
	return term{fmt.Sprintf("%s type %d @th,%d,16 %d", word, typ, offset*8, port), e}
}

func skuid(r UIDRange, eq bool) term {
	s, op := opOf(eq)
	if r.First == r.Last {
		return term{fmt.Sprintf("meta skuid %s %d", s, r.First),
			[]expr.Any{loadMeta(expr.MetaKeySKUID), cmp(op, native32(r.First))}}
	}
	return term{fmt.Sprintf("meta skuid %d-%d", r.First, r.Last), []expr.Any{loadMeta(expr.MetaKeySKUID),
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		cmp(expr.CmpOpGte, be32(r.First)), cmp(expr.CmpOpLte, be32(r.Last))}}
}

// cgroup is a control group as nftables identifies it: by its inode and its depth.
type cgroup struct {
	path  string
	level uint32
	id    uint64
}

func socketCgroup(c cgroup, eq bool) term {
	s, op := opOf(eq)
	return term{fmt.Sprintf("socket cgroupv2 level %d %s %q", c.level, s, c.path), []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: c.level, Register: 1},
		cmp(op, binary.NativeEndian.AppendUint64(nil, c.id))}}
}

func ctDirection(reply bool) term {
	if reply {
		return term{"ct direction reply", []expr.Any{loadCt(expr.CtKeyDIRECTION), cmp(expr.CmpOpEq, []byte{1})}}
	}
	return term{"ct direction original", []expr.Any{loadCt(expr.CtKeyDIRECTION), cmp(expr.CmpOpEq, []byte{0})}}
}

func ctNew() term {
	return term{"ct state new", []expr.Any{loadCt(expr.CtKeySTATE), mask32(expr.CtStateBitNEW, 0),
		cmp(expr.CmpOpNeq, native32(0))}}
}

// ctNone matches packets that belong to no flow: conntrack ignores them or cannot interpret them.
func ctNone() term {
	return term{
		"ct state invalid,untracked",
		[]expr.Any{
			loadCt(expr.CtKeySTATE),
			mask32(expr.CtStateBitINVALID|expr.CtStateBitUNTRACKED, 0),
			cmp(expr.CmpOpNeq, native32(0)),
		},
	}
}

// daddrType matches the type of the destination from this host's view.
func daddrType(name string, rtn uint32) term {
	return term{
		"fib daddr type " + name,
		[]expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, cmp(expr.CmpOpEq, native32(rtn))},
	}
}

// lookup matches packets whose key is in a set. loads load the key into consecutive registers.
func lookup(set string, text string, v6 *bool, loads ...expr.Any) term {
	var e []expr.Any
	if v6 != nil {
		e = isFamily(*v6)
	}
	e = append(e, loads...)
	return term{text + " @" + set, append(e, &expr.Lookup{SourceRegister: 8, SetName: set})}
}

// ownEndpoint looks up protocol, destination and port.
func ownEndpoint(set string, v6 bool) term {
	word, off, n := "ip", uint32(16), uint32(4)
	if v6 {
		word, off, n = "ip6", 24, 16
	}
	return lookup(set, "meta l4proto . "+word+" daddr . th dport", &v6,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 8},
		&expr.Payload{DestRegister: 9, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: n},
		&expr.Payload{DestRegister: 9 + n/4, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
}

// keptTuple looks up the 5-tuple of a packet, this host's end first: the source of outgoing and the destination of
// incoming packets.
func keptTuple(set string, v6, in bool) term {
	key, loads := tupleOf(v6, in)
	return lookup(set, key, &v6, loads...)
}

// tupleOf returns the key for keptTuple's sets, as text and for the kernel.
func tupleOf(v6, in bool) (string, []expr.Any) {
	word, src, n := "ip", uint32(12), uint32(4)
	if v6 {
		word, src, n = "ip6", 8, 16
	}
	local, remote, lport, rport, l, r := src, src+n, uint32(0), uint32(2), "s", "d"
	if in {
		local, remote, lport, rport, l, r = remote, local, rport, lport, r, l
	}
	return fmt.Sprintf("meta l4proto . %[1]s %[2]saddr . th %[2]sport . %[1]s %[3]saddr . th %[3]sport", word, l, r), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 8},
		&expr.Payload{DestRegister: 9, Base: expr.PayloadBaseNetworkHeader, Offset: local, Len: n},
		&expr.Payload{DestRegister: 9 + n/4, Base: expr.PayloadBaseTransportHeader, Offset: lport, Len: 2},
		&expr.Payload{DestRegister: 10 + n/4, Base: expr.PayloadBaseNetworkHeader, Offset: remote, Len: n},
		&expr.Payload{DestRegister: 10 + n/2, Base: expr.PayloadBaseTransportHeader, Offset: rport, Len: 2}}
}

// tcpSYN matches the first segment of a connection.
func tcpSYN() term {
	return term{"tcp flags & (fin | syn | rst | ack) == syn", append(l4proto(unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x17}, Xor: []byte{0}},
		cmp(expr.CmpOpEq, []byte{0x02}))}
}

// ctDNAT matches connections whose destination is translated, such as published ports.
func ctDNAT() term {
	return term{"ct status dnat", []expr.Any{loadCt(expr.CtKeySTATUS), mask32(1<<5, 0), cmp(expr.CmpOpNeq, native32(0))}}
}

func oifSet(set string) term {
	return lookup(set, "oifname", nil, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 8})
}

// arpTarget matches ARP requests for an address of ours.
func arpTarget(a netip.Addr) term {
	return term{"arp daddr ip " + a.String(), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 4}, cmp(expr.CmpOpEq, a.AsSlice())}}
}

func arpFrame() term {
	return term{"meta protocol arp", etherType(unix.ETH_P_ARP)}
}

func verdict(k expr.VerdictKind, chain string) term {
	words := map[expr.VerdictKind]string{expr.VerdictAccept: "accept", expr.VerdictDrop: "drop",
		expr.VerdictReturn: "return", expr.VerdictJump: "jump", expr.VerdictGoto: "goto"}
	return term{strings.TrimSpace(words[k] + " " + chain), []expr.Any{&expr.Verdict{Kind: k, Chain: chain}}}
}

func accept() term           { return verdict(expr.VerdictAccept, "") }
func drop() term             { return verdict(expr.VerdictDrop, "") }
func back() term             { return verdict(expr.VerdictReturn, "") }
func jump(chain string) term { return verdict(expr.VerdictJump, chain) }
func goTo(chain string) term { return verdict(expr.VerdictGoto, chain) }
func count(name string) term {
	return term{"counter name " + name, []expr.Any{&expr.Objref{Type: 1, Name: name}}}
}
func rejectReset() term {
	return term{"reject with tcp reset", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}
func rejectICMPX(word string, code uint8) term {
	return term{"reject with icmpx type " + word, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: code}}}
}

// ownHost looks up protocol and destination.
func ownHost(set string, v6 bool) term {
	word, off, n := "ip", uint32(16), uint32(4)
	if v6 {
		word, off, n = "ip6", 24, 16
	}
	return lookup(set, "meta l4proto . "+word+" daddr", &v6,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 8},
		&expr.Payload{DestRegister: 9, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: n})
}

// lapsed matches every packet when key is no longer in the set, and holds every packet as long as it is.
func lapsed(set, key string) term { return holdsOrNot(set, key, "!=", true) }
func holds(set, key string) term  { return holdsOrNot(set, key, "==", false) }

func holdsOrNot(set, key, op string, invert bool) term {
	return term{fmt.Sprintf("%q %s @%s", key, op, set), []expr.Any{
		&expr.Immediate{Register: 8, Data: ifname(key)}, &expr.Lookup{SourceRegister: 8, SetName: set, Invert: invert}}}
}

// ctRelated matches errors about other packets, and connections that a helper expects.
func ctRelated() term {
	return term{
		"ct state related",
		[]expr.Any{loadCt(expr.CtKeySTATE), mask32(expr.CtStateBitRELATED, 0), cmp(expr.CmpOpNeq, native32(0))},
	}
}
