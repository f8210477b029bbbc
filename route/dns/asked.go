package dns

import "net/netip"

// canBeAsked reports whether there can be a server at a.
func canBeAsked(a netip.AddrPort) bool {
	return a.IsValid() && a.Port() != 0 && !a.Addr().IsUnspecified() && !a.Addr().IsMulticast()
}

// StandsForName reports whether a is a fake address that stands for a name now. A question to it goes to the server
// with this name.
func (s *Server) StandsForName(a netip.Addr) bool {
	if s.fake.pool == nil || !s.fake.pool.Contains(a) {
		return false
	}
	var room [maxName]byte
	_, ok := s.fake.pool.AppendName(room[:0], a)
	return ok
}

// serverAt returns the server that the app asked at a: over TCP, because only this works through every upstream. It is
// the zero Resolver if there can be none, or if a is a fake address that no longer stands for a name.
func (s *Server) serverAt(a netip.AddrPort) Resolver {
	if !canBeAsked(a) {
		return Resolver{}
	}
	if s.fake.pool == nil || !s.fake.pool.Contains(a.Addr()) {
		return OverTCP(a)
	}
	name, ok := s.fake.pool.AppendName(nil, a.Addr())
	if !ok {
		return Resolver{}
	}
	return Resolver{Addr: netip.AddrPortFrom(netip.Addr{}, a.Port()), Name: string(name)}
}
