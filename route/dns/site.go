package dns

import "net/netip"

// Names that belong to a site (local, home.arpa, the reverse zones of private addresses) are sent only to the site's
// own resolvers. A resolver counts as one of these if it has a private address. One that is given by name may be
// anywhere.

// isSite reports whether a question goes to a resolver of a site: to asked if toAsked is set, and to the Resolvers
// otherwise.
func (s *Server) isSite(toAsked bool, asked netip.AddrPort) bool {
	if toAsked {
		return isPrivate(asked.Addr())
	}
	return s.site
}

func allPrivate(all []Resolver) bool {
	for _, r := range all {
		if !isPrivate(r.Addr.Addr()) {
			return false
		}
	}
	return true
}

var sharedSpace = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

func isPrivate(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || sharedSpace.Contains(a)
}

// onlyTor reports whether all resolvers are Tors.
func onlyTor(all []Resolver) bool {
	for _, r := range all {
		if r.Kind != Tor {
			return false
		}
	}
	return true
}
