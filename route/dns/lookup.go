package dns

import (
	"net/netip"
	"time"
)

// LookUp asks the resolvers for an IPv6 or IPv4 address of name, ignoring fake addresses. name is in the form of
// Pool. done is called once, from Run's goroutine, with the first address of the answer and its TTL; an invalid
// address means that there is none, or that no resolver answered. If LookUp returns false, done will not be called.
// If Run ends first, it is not called either.
func (s *Server) LookUp(name string, v6 bool, done func(a netip.Addr, ttl time.Duration)) bool {
	if !isHost([]byte(name)) {
		return false
	}
	msg := make([]byte, headerLen, headerLen+maxName+4)
	msg[2], msg[5] = flagRD>>8, 1
	typ := byte(typeA)
	if v6 {
		typ = typeAAAA
	}
	msg = append(appendWire(msg, []byte(name)), 0, typ, 0, classIN)
	return s.Ask(msg, func(b []byte) {
		var found netip.Addr
		var life time.Duration
		Addresses(b, func(_ string, a netip.Addr, ttl time.Duration) {
			if !found.IsValid() && a.Is6() == v6 {
				found, life = a, ttl
			}
		})
		done(found, life)
	})
}
