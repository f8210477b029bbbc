package dns

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// Types of RFC 1035, section 3.2.2, RFC 3596, section 2.1, and RFC 9460, section 14.1, and the class IN.
const (
	typeA     = 1
	typeSOA   = 6
	typePTR   = 12
	typeAAAA  = 28
	typeSVCB  = 64
	typeHTTPS = 65
	typeANY   = 255
	classIN   = 1
	classANY  = 255

	rcodeName     = 3
	flagRA        = 0x0080
	badVersion    = 1                  // the upper bits of BADVERS (RFC 6891, section 9), which are in the OPT record
	toQuestion    = 0xC000 | headerLen // a compression pointer to the name of the question
	loopbackTTL   = time.Hour
	maxFakeAnswer = headerLen + 2*(maxName+4) + 64 // longer than any answer of fake
)

// fake answers questions with addresses of a pool, and questions that must not be sent to any resolver. It has no
// state of its own.
type fake struct {
	pool   *Pool // nil: only names that must not be sent to any resolver are answered
	config FakeConfig
}

// FakeConfig tells how names become fake addresses.
type FakeConfig struct {
	Pool *Pool // nil: they do not
	// IPv6 reports whether a name, in lower case and without the dot at the end, also has an IPv6 address. It is
	// called for each question for one, from any goroutine, and must not keep name. nil: all names have.
	IPv6 func(name []byte) bool
	// Real reports whether a name, in lower case and without the dot at the end, gets its real addresses. It is
	// called for each question for an address, from any goroutine, and must not keep name. nil: none does.
	Real func(name []byte) bool
	// Onion reports whether an upstream can resolve .onion names (RFC 7686), so that they get addresses like others.
	// It is called for each such question, from any goroutine. nil: none can. Record types other than addresses do
	// not exist for these names.
	Onion func() bool
	// NoSingleLabels means that a name without a dot does not exist. Otherwise the proxy resolves it, whose network
	// may know it.
	NoSingleLabels bool
}

// outcome is what happened to a question.
type outcome uint8

const (
	passed   outcome = iota // a resolver must be asked
	answered                // there is an answer
	faked                   // there is an answer from the pool
	full                    // the answer is SERVFAIL: the pool has no free address
)

// answer appends the answer to a question to b. msg has been checked by parseQuestion. It allocates only to grow b
// beyond maxFakeAnswer.
//
// It answers, whatever the type, names that must not be sent to public resolvers according to RFC 6761 (localhost,
// invalid), 6762 (local), 7686 (onion), 8375 (home.arpa) and 6303 (reverse zones of private addresses). site means
// that the resolver for the question has a private address and may know the names of its own network; questions in
// local, home.arpa and the reverse zones are then sent to it.
func (f *fake) answer(b, msg []byte, q *question, site bool) ([]byte, outcome) {
	class := binary.BigEndian.Uint16(msg[q.end-2:])
	if q.ednsVersion != 0 && f.pool != nil {
		return appendReply(b, msg, q, 0, nothing), answered
	}
	if class != classIN && class != classANY {
		return b, passed
	}
	// The name is stored where the answer will be. A local array would move to the heap, because the compiler does
	// not know that Real keeps nothing.
	name, labels, plain := appendAny(b[len(b):], msg, headerLen)
	if out, o := f.reserved(b, msg, q, name, site); o != passed {
		return out, o
	}
	switch {
	case f.pool == nil, !plain, // such a name cannot be sent to a proxy
		site && isSites(name), hasSuffix(name, "arpa"):
		return b, passed
	case isNumber(name), f.config.NoSingleLabels && labels == 1:
		return appendReply(b, msg, q, rcodeName, negative), answered
	}
	if !isAddress(q.qtype) || f.config.Real != nil && f.config.Real(name) {
		return b, passed
	}
	return f.address(b, msg, q, name)
}

// isSites reports whether a name is in a zone that each site has for itself, other than a reverse zone.
func isSites(name []byte) bool { return hasSuffix(name, "local") || hasSuffix(name, "home.arpa") }

// reserved answers questions for names that must not be sent to any resolver.
func (f *fake) reserved(b, msg []byte, q *question, name []byte, site bool) ([]byte, outcome) {
	switch {
	case hasSuffix(name, "localhost"):
		return f.loopback(b, msg, q), answered
	case site && isSites(name):
		return b, passed
	case hasSuffix(name, "home.arpa"):
		if len(name) == len("home.arpa") {
			return appendReply(b, msg, q, 0, negative), answered
		}
		return appendReply(b, msg, q, rcodeName, negative), answered
	case hasSuffix(name, "resolver.arpa"): // RFC 9462, section 6.4: a question for another way to ask us, and there is none
		return appendReply(b, msg, q, 0, negative), answered
	case hasSuffix(name, "arpa"):
		return f.reverse(b, msg, q, name, site)
	case hasSuffix(name, "local"), hasSuffix(name, "invalid"):
		return appendReply(b, msg, q, rcodeName, negative), answered
	case hasSuffix(name, "onion"):
		switch {
		case f.config.Onion == nil || !f.config.Onion():
			return appendReply(b, msg, q, rcodeName, negative), answered
		case !isAddress(q.qtype): // a resolver must not be asked, and a Tor does not know
			return appendReply(b, msg, q, 0, negative), answered
		}
	}
	return b, passed
}

// isAddress reports whether a type may be answered with a fake address.
func isAddress(qtype uint16) bool {
	switch qtype {
	case typeA, typeAAAA, typeANY, typeHTTPS, typeSVCB:
		return true
	}
	return false
}

// address answers with the addresses that stand for name. HTTPS and SVCB get an empty answer, because their hints
// would be real addresses.
func (f *fake) address(b, msg []byte, q *question, name []byte) ([]byte, outcome) {
	v6 := (q.qtype == typeAAAA || q.qtype == typeANY) && (f.config.IPv6 == nil || f.config.IPv6(name))
	if q.qtype == typeHTTPS || q.qtype == typeSVCB || q.qtype == typeAAAA && !v6 {
		return appendReply(b, msg, q, 0, negative), answered
	}
	a4, a6, ok := f.pool.Give(name)
	if !ok {
		return appendReply(b, msg, q, rcodeServer, nothing), full
	}
	set := addressSet{ttl: f.pool.TTL()}
	if q.qtype != typeAAAA {
		set.v4 = a4
	}
	if v6 {
		set.v6 = a6
	}
	return appendReply(b, msg, q, 0, set), faked
}

func (f *fake) loopback(b, msg []byte, q *question) []byte {
	set := addressSet{ttl: loopbackTTL}
	switch q.qtype {
	case typeA:
		set.v4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case typeAAAA:
		set.v6 = netip.IPv6Loopback()
	default:
		set = negative
	}
	return appendReply(b, msg, q, 0, set)
}

// reverse answers for names below arpa: for addresses of the pool from the pool, and for those of private networks
// with "no such name", because only a resolver of that network could know them, unless site means that one is asked.
func (f *fake) reverse(b, msg []byte, q *question, name []byte, site bool) ([]byte, outcome) {
	p, whole := reversePrefix(name)
	if !p.IsValid() {
		return b, passed
	}
	if whole && p.IsSingleIP() && f.pool != nil && f.pool.Contains(p.Addr()) {
		var buf [maxName]byte
		host, known := f.pool.AppendName(buf[:0], p.Addr())
		switch {
		case !known:
			return appendReply(b, msg, q, rcodeName, negative), answered
		case q.qtype != typePTR && q.qtype != typeANY:
			return appendReply(b, msg, q, 0, negative), answered
		}
		return appendReply(b, msg, q, 0, addressSet{ttl: f.pool.TTL(), host: host}), faked
	}
	ours := f.pool != nil && (within(f.pool.v4, p) || within(f.pool.v6, p))
	if ours || !site && isLocalZone(p) {
		return appendReply(b, msg, q, rcodeName, negative), answered
	}
	return b, passed
}

// addressSet is the content of an answer.
type addressSet struct {
	v4, v6   netip.Addr // A and AAAA, if valid
	host     []byte     // PTR, if not nil
	ttl      time.Duration
	negative bool // an SOA record that lets the asker cache for ttl that there is nothing (RFC 2308)
}

var (
	nothing  = addressSet{}
	negative = addressSet{negative: true, ttl: 10 * time.Second}
)

// appendReply appends an answer to msg with the records of set. It repeats the name of the question letter by letter,
// because its case may be the asker's proof that the answer belongs to the question.
func appendReply(b, msg []byte, q *question, rcode uint16, set addressSet) []byte {
	start := len(b)
	b = append(b, make([]byte, headerLen)...)
	b = append(b, msg[headerLen:q.end]...)
	count := uint16(0)
	ttl := uint32(set.ttl / time.Second)
	if set.v4.IsValid() {
		a := set.v4.As4()
		b = append(appendRecord(b, typeA, ttl, len(a)), a[:]...)
		count++
	}
	if set.v6.IsValid() {
		a := set.v6.As16()
		b = append(appendRecord(b, typeAAAA, ttl, len(a)), a[:]...)
		count++
	}
	if set.host != nil {
		b = appendWire(appendRecord(b, typePTR, ttl, len(set.host)+2), set.host)
		count++
	}
	if set.negative {
		b = appendRecord(b, typeSOA, ttl, 2+20)
		b = append(b, 0, 0) // the names of server and administrator are empty
		for _, v := range [...]uint32{1, 3600, 600, 86400, ttl} {
			b = binary.BigEndian.AppendUint32(b, v)
		}
	}
	h := b[start : start+headerLen]
	binary.BigEndian.PutUint16(h, q.id)
	binary.BigEndian.PutUint16(h[2:], flagQR|flagRA|q.flags&(flagRD|flagCD)|rcode)
	h[5] = 1
	binary.BigEndian.PutUint16(h[6:], count)
	if set.negative {
		h[9] = 1
	}
	if q.edns {
		h[11] = 1
		extended := byte(0)
		if q.ednsVersion != 0 {
			extended = badVersion
		}
		b = append(b, 0, 0, typeOPT, ednsSize>>8, ednsSize&0xFF, extended, 0, 0, 0, 0, 0)
	}
	return b
}

// appendRecord appends a record for the question's name, without its data.
func appendRecord(b []byte, typ uint16, ttl uint32, data int) []byte {
	b = append(b, toQuestion>>8, toQuestion&0xFF, byte(typ>>8), byte(typ), 0, classIN)
	b = binary.BigEndian.AppendUint32(b, ttl)
	return binary.BigEndian.AppendUint16(b, uint16(data))
}

// appendWire appends a name from appendHost in the form of RFC 1035, section 3.1, which is two bytes longer.
func appendWire(b, name []byte) []byte {
	at := len(b)
	b = append(b, 0)
	for _, c := range name {
		if c == '.' {
			at = len(b)
			b = append(b, 0)
			continue
		}
		b = append(b, c)
		b[at]++
	}
	return append(b, 0)
}

// localZones are the networks whose reverse zones belong to each site (RFC 6303, section 4; RFC 6761, section 6.1;
// RFC 6598; RFC 7793).
var localZones = [...]netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::/127"), netip.MustParsePrefix("fd00::/8"), netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("2001:db8::/32"),
}

func isLocalZone(p netip.Prefix) bool {
	for _, z := range localZones {
		if within(z, p) {
			return true
		}
	}
	return false
}

// within reports whether p is a part of network, or all of it.
func within(network, p netip.Prefix) bool {
	return network.Bits() <= p.Bits() && network.Contains(p.Addr())
}

// reversePrefix returns the network that a name below in-addr.arpa or ip6.arpa is about (RFC 1035, section 3.5; RFC
// 3596, section 2.5). If it has further labels in front, as in lb._dns-sd._udp.10.in-addr.arpa, ok is false, and p is
// the network of the rest, if there is one.
func reversePrefix(name []byte) (p netip.Prefix, ok bool) {
	if hasSuffix(name, "in-addr.arpa") {
		return reverse4(name[:len(name)-len("in-addr.arpa")])
	}
	if hasSuffix(name, "ip6.arpa") {
		return reverse6(name[:len(name)-len("ip6.arpa")])
	}
	return p, false
}

func reverse4(rest []byte) (p netip.Prefix, ok bool) {
	var a [4]byte
	n := 0
	for ; len(rest) > 0 && n < len(a); n++ {
		before, label := lastLabel(rest)
		v := 0
		for _, c := range label {
			if c < '0' || c > '9' || v > 255 {
				v = 256
				break
			}
			v = v*10 + int(c-'0')
		}
		if v > 255 || len(label) > 1 && label[0] == '0' {
			break
		}
		a[n], rest = byte(v), before
	}
	if n == 0 {
		return p, false
	}
	return netip.PrefixFrom(netip.AddrFrom4(a), 8*n), len(rest) == 0
}

func reverse6(rest []byte) (p netip.Prefix, ok bool) {
	var a [16]byte
	n := 0
	for ; len(rest) > 0 && n < 2*len(a); n++ {
		before, label := lastLabel(rest)
		if len(label) != 1 {
			break
		}
		c := label[0]
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		default:
			c = 16
		}
		if c == 16 {
			break
		}
		a[n/2] |= c << (4 * (1 - n%2))
		rest = before
	}
	if n == 0 {
		return p, false
	}
	return netip.PrefixFrom(netip.AddrFrom16(a), 4*n), len(rest) == 0
}

// lastLabel splits "a.b." into "a." and "b".
func lastLabel(name []byte) (rest, label []byte) {
	name = name[:len(name)-1]
	for i := len(name); i > 0; i-- {
		if name[i-1] == '.' {
			return name[:i], name[i:]
		}
	}
	return nil, name
}
