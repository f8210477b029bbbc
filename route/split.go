package route

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"strings"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// Split tells which names are looked up at other servers than the resolvers, and which have no fake address.
type Split struct {
	// Zones have their own servers, whether or not names have fake addresses.
	Zones []dns.Zone
	// Exclude are names that get their real addresses from the resolvers although others have fake ones.
	Exclude []Names
	// NoSingleLabels means that a name without a dot does not exist if names have fake addresses.
	NoSingleLabels bool
}

// HostDNS tells how DNS servers are asked past every upstream: those of the host, and the direct servers of
// Split.Zones.
type HostDNS struct {
	// Servers returns the host's current servers. It is called for each question that goes to them, from any
	// goroutine.
	Servers func() []dns.DirectServer
	// Dial connects to a server from a socket that is steered past the TUN.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Names is a set of names.
type Names struct {
	patterns []namePattern
	list     *list // nil: none
}

// ParseNames parses PATTERN[,PATTERN...] or list=FILE, in the form of a rule. A file is not read again later.
func ParseNames(s string) (n Names, err error) {
	if path, ok := strings.CutPrefix(s, listWord); ok {
		n.list, err = loadList(path)
		return n, err
	}
	n.patterns, err = parsePatterns(s)
	return n, err
}

// List returns the file of the names; empty: none.
func (n Names) List() string {
	if n.list == nil {
		return ""
	}
	return n.list.path
}

// has reports whether a plain name is in the set.
func (n Names) has(name string) bool {
	if n.list != nil {
		return n.list.hasName(name)
	}
	for _, p := range n.patterns {
		if p.matches(name) {
			return true
		}
	}
	return false
}

// excludes reports whether a plain name gets its real addresses from the resolvers.
func (s *Split) excludes(name string) bool {
	for _, n := range s.Exclude {
		if n.has(name) {
			return true
		}
	}
	return false
}

// sameServers reports whether one dns.Server can serve both. Their excluded names are checked for each question.
func (s *Split) sameServers(o *Split) bool {
	return reflect.DeepEqual(s.Zones, o.Zones) && s.NoSingleLabels == o.NoSingleLabels
}

// mayBeDirect reports whether sendsDirect can return true for any name.
func (p *policy) mayBeDirect() bool {
	return p.upstreams[DirectName] != nil
}

// sendsDirect reports whether flows to a plain name are direct, or refused, whatever else is known about them. A
// program that gets the name's real address then reaches it without a look-up by us. If a rule sends some of the
// flows to the name through a proxy, the name needs a fake address, so that the proxy gets the name.
func (p *policy) sendsDirect(name string) bool {
	q := query{names: []string{name}}
	for i := range p.rules {
		r := &p.rules[i]
		switch {
		case !r.mayMean(&q):
		case r.asksNameAlone():
			return p.verdicts[i].isDirect()
		case r.action == ActionVia && !p.verdicts[i].isDirect():
			return false
		}
	}
	return p.otherwise.isDirect()
}

func (v *verdict) isDirect() bool { return v.kind == carry && v.up.name == DirectName }

// ParseZone parses SUFFIX=SERVER[,SERVER...]. A SERVER in the form of dns.ParseResolver is asked through the
// upstream, and direct:udp://ADDRESS or direct:tcp://ADDRESS past it; direct alone means the host's own servers.
// Errors have the form "must be ...".
func ParseZone(s string) (z dns.Zone, err error) {
	suffix, servers, ok := strings.Cut(s, "=")
	if !ok || servers == "" {
		return z, errors.New("must be SUFFIX=SERVER, such as corp.example=tcp://10.0.0.53")
	}
	z.Suffix = strings.TrimPrefix(strings.TrimPrefix(plainName(suffix), "*"), ".")
	if err := checkDomain(z.Suffix, false); err != nil {
		return z, fmt.Errorf("must have the name of a zone before the equals sign, and not %q: %w", clip(suffix), err)
	}
	if z.Suffix == "localhost" || strings.HasSuffix(z.Suffix, ".localhost") {
		return z, errors.New("must not be about localhost, which is this host (RFC 6761)")
	}
	if servers == DirectName {
		return z, nil
	}
	for server := range strings.SplitSeq(servers, ",") {
		server = strings.TrimSpace(server)
		direct, isDirect := strings.CutPrefix(server, DirectName+":")
		if !isDirect {
			r, err := dns.ParseResolver(server)
			if err != nil || flow.IsOurs(r.Addr.Addr()) {
				return z, badServer(server)
			}
			z.Resolvers = append(z.Resolvers, r)
			continue
		}
		d := dns.DirectServer{TCP: strings.HasPrefix(direct, "tcp://")}
		scheme := "udp://"
		if d.TCP {
			scheme = "tcp://"
		}
		if d.Addr, err = parseServer(direct, scheme); err != nil {
			return z, err
		}
		z.Direct = append(z.Direct, d)
	}
	if len(z.Resolvers) > 0 && len(z.Direct) > 0 {
		return z, errors.New("must not mix direct servers with others")
	}
	return z, nil
}

func badServer(s string) error {
	return fmt.Errorf("must have servers such as tcp://10.0.0.53, direct:udp://10.0.0.53 or direct, and not %q", clip(s))
}

// parseServer parses the address of a server after scheme.
func parseServer(s, scheme string) (netip.AddrPort, error) {
	bad := badServer(s)
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return netip.AddrPort{}, bad
	}
	at, err := netip.ParseAddrPort(rest)
	if err != nil {
		a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(rest, "["), "]"))
		if err != nil {
			return at, bad
		}
		at = netip.AddrPortFrom(a, 53)
	}
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	if at.Port() == 0 || !flow.OneHost(at.Addr()) && !at.Addr().IsLoopback() || flow.IsOurs(at.Addr()) || at.Addr().Zone() != "" {
		return at, bad
	}
	return at, nil
}
