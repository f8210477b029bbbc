package kernel

import (
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TCP connections from outside outlive their conntrack entries. `conntrack -F` or -D removes the mark that lets their
// answers out, and in the middle of a connection nothing else distinguishes it from one that this host opened. The
// filter therefore records them in the sets came4 and came6, this host's end first, for as long as conntrack calls
// them established.
const (
	// cameFor is how long a silent connection is remembered: the default of conntrack
	// (nf_conntrack_tcp_timeout_established). Each segment from outside renews it.
	cameFor  = 5 * 24 * time.Hour
	cameSize = 1 << 17
	// establishedFor recognizes an established connection by the time that conntrack will wait for its next segment:
	// in all other states that is at most 300 s (nf_conntrack_tcp_timeout_max_retrans, _unacknowledged). A forged SYN
	// thus records nothing, and the last ACK of a connection does not record it again.
	establishedFor = 301 * time.Second
)

// dynsetDelete is NFT_DYNSET_OP_DELETE of linux/netfilter/nf_tables.h, since Linux 5.4.
const dynsetDelete = 2

var tupleKeys = map[bool]struct {
	set, text      string
	keyType, keyLn uint32
}{
	false: {"came4", "inet_proto . ipv4_addr . inet_service . ipv4_addr . inet_service",
		concat(typeProto, typeIP4, typePort, typeIP4, typePort), 20},
	true: {"came6", "inet_proto . ipv6_addr . inet_service . ipv6_addr . inet_service",
		concat(typeProto, typeIP6, typePort, typeIP6, typePort), 44},
}

// cameSets returns the sets of established connections from outside.
func cameSets() (sets []*nfSet) {
	for _, v6 := range []bool{false, true} {
		k := tupleKeys[v6]
		sets = append(sets, &nfSet{name: k.set, keyText: k.text, keyType: k.keyType, keyLen: k.keyLn,
			dynamic: true, size: cameSize, keep: cameFor})
	}
	return sets
}

// noteCame adds the rules that record and forget connections as their segments arrive.
func (c *Config) noteCame(t *nfTable, pre *nfChain) {
	note := t.chain(&nfChain{name: "note_came"})
	forget := t.chain(&nfChain{name: "forget_came"})
	for _, v6 := range []bool{false, true} {
		set := tupleKeys[v6].set
		note.add(changeTuple(set, v6, true, unix.NFT_DYNSET_OP_UPDATE))
		forget.add(changeTuple(set, v6, true, dynsetDelete))
	}
	in := t.chain(&nfChain{name: "came_in"})
	in.add(tcpEnds(), goTo("forget_came"))
	in.add(ctExpiresAfter(establishedFor), goTo("note_came"))
	pre.add(isProto(unix.IPPROTO_TCP), ctMark(c.Marks, c.Marks.Inbound, true), jump("came_in"))
}

// recallCame adds the rules that let answers out whose conntrack entry is gone. For conntrack, the first segment
// after that is a new flow, or part of no flow if it does not pick up connections (nf_conntrack_tcp_loose=0). A SYN
// is not an answer.
func (c *Config) recallCame(t *nfTable, out *nfChain) {
	m := c.Marks
	again := t.chain(&nfChain{name: "came"})
	again.add(tcpSYN(), back())
	lost := t.chain(&nfChain{name: "came_lost"})
	lost.add(tcpSYN(), back())
	for _, v6 := range []bool{false, true} {
		set := tupleKeys[v6].set
		again.add(keptTuple(set, v6, false), setCtMark(m, m.Inbound))
		lost.add(keptTuple(set, v6, false), setMetaMark(m, m.Inbound))
		lost.add(keptTuple(keptSet(v6), v6, false), setMetaMark(m, m.Inbound))
	}
	out.add(isProto(unix.IPPROTO_TCP), ctDirection(false), ctMark(m, 0, true), ctNew(), jump("came"))
	out.add(isProto(unix.IPPROTO_TCP), ctNone(), jump("came_lost"))
}

// passCame adds the rules that let out what came_lost has marked.
func (c *Config) passCame(pass *nfChain) {
	for _, v6 := range []bool{false, true} {
		for _, set := range []string{tupleKeys[v6].set, keptSet(v6)} {
			pass.add(ctNone(), metaMark(c.Marks, c.Marks.Inbound, true), keptTuple(set, v6, false), accept())
		}
	}
}

// keptSet returns the name of the set of connections that were open before.
func keptSet(v6 bool) string {
	if v6 {
		return "kept6"
	}
	return "kept4"
}

// changeTuple adds the 5-tuple of a packet to a set of 5-tuples, or removes it.
func changeTuple(set string, v6, in bool, op uint32) term {
	key, loads := tupleOf(v6, in)
	word := "update"
	if op == dynsetDelete { // nft(8) adds the family itself, but only to an update
		word = "meta protocol ip delete"
		if v6 {
			word = "meta protocol ip6 delete"
		}
	}
	return term{word + " @" + set + " { " + key + " }",
		append(append(isFamily(v6), loads...), &expr.Dynset{SrcRegKey: 8, SetName: set, Operation: op})}
}

// tcpEnds matches a FIN or RST.
func tcpEnds() term {
	return term{"tcp flags & (fin | rst) != 0", append(l4proto(unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x05}, Xor: []byte{0}},
		cmp(expr.CmpOpNeq, []byte{0}))}
}

// ctExpiresAfter matches flows that conntrack will keep for longer than d without another packet.
func ctExpiresAfter(d time.Duration) term {
	return term{"ct expiration > " + nftTime(d), []expr.Any{loadCt(expr.CtKeyEXPIRATION),
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		cmp(expr.CmpOpGt, be32(uint32(d.Milliseconds())))}}
}
