package route

import (
	"crypto/rand"
	"encoding/binary"
	"net/netip"
)

// The parts of STUN (RFC 8489) that a Binding request and its answer need. Sections 5 and 14 have the formats.
const (
	stunHeader   = 20
	stunCookie   = 0x2112A442
	stunRequest  = 0x0001
	stunAnswer   = 0x0101
	stunRefusal  = 0x0111
	stunMapped   = 0x0001 // MAPPED-ADDRESS, which servers of RFC 3489 send alone
	stunXORed    = 0x0020 // XOR-MAPPED-ADDRESS
	stunFamilyV4 = 1
	stunFamilyV6 = 2
)

// stunID is what an answer must repeat: the magic cookie and a transaction ID that nobody can guess.
type stunID [16]byte

func newStunID() (id stunID) {
	binary.BigEndian.PutUint32(id[:], stunCookie)
	_, _ = rand.Read(id[4:])
	return id
}

// request returns a Binding request without attributes.
func (id stunID) request() []byte {
	b := binary.BigEndian.AppendUint16(make([]byte, 0, stunHeader), stunRequest)
	return append(append(b, 0, 0), id[:]...)
}

// answers reports whether msg is an answer to the request with this ID, even if it is a refusal or has no valid endpoint.
func (id stunID) answers(msg []byte) bool {
	if len(msg) < stunHeader || stunID(msg[4:stunHeader]) != id {
		return false
	}
	t := binary.BigEndian.Uint16(msg)
	return t == stunAnswer || t == stunRefusal
}

// parseStun returns the endpoint from which the server received the request. It is invalid if msg contains none.
func parseStun(msg []byte) (at netip.AddrPort) {
	if len(msg) < stunHeader || binary.BigEndian.Uint16(msg) != stunAnswer ||
		int(binary.BigEndian.Uint16(msg[2:])) != len(msg)-stunHeader {
		return netip.AddrPort{}
	}
	for b := msg[stunHeader:]; len(b) >= 4; {
		kind, n := binary.BigEndian.Uint16(b), int(binary.BigEndian.Uint16(b[2:]))
		if b = b[4:]; n > len(b) {
			return netip.AddrPort{}
		}
		switch kind {
		case stunXORed: // it takes precedence over MAPPED-ADDRESS, which some NATs rewrite
			return stunEndpoint(b[:n], msg[4:stunHeader])
		case stunMapped:
			at = stunEndpoint(b[:n], make([]byte, 16))
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return at
}

// stunEndpoint parses the value of an address attribute. mask is what the port and the address were XORed with.
func stunEndpoint(b, mask []byte) (at netip.AddrPort) {
	size := 0
	switch {
	case len(b) == 8 && b[1] == stunFamilyV4:
		size = 4
	case len(b) == 20 && b[1] == stunFamilyV6:
		size = 16
	default:
		return netip.AddrPort{}
	}
	port := binary.BigEndian.Uint16(b[2:]) ^ binary.BigEndian.Uint16(mask)
	ip := append([]byte(nil), b[4:4+size]...)
	for i := range ip {
		ip[i] ^= mask[i]
	}
	if a, ok := netip.AddrFromSlice(ip); ok && port != 0 {
		at = netip.AddrPortFrom(a.Unmap(), port)
	}
	return at
}
