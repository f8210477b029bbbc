package dns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// Kind tells how a resolver is asked.
type Kind uint8

const (
	TCP   Kind = iota // DNS over TCP: RFC 7766
	TLS               // DNS over TLS: RFC 7858
	HTTPS             // DNS over HTTPS: RFC 8484
	Tor               // the upstream, which must be a Tor, by RESOLVE and RESOLVE_PTR: only for A, AAAA and PTR
)

var kinds = [...]struct {
	scheme string
	port   uint16
}{TCP: {"tcp", 53}, TLS: {"tls", 853}, HTTPS: {"https", 443}, Tor: {"tor", 0}}

// Resolver describes where a resolver is and how it is asked. It is comparable.
type Resolver struct {
	Kind Kind
	Addr netip.AddrPort // with a port; if the address is the zero Addr, the upstream gets Name
	Name string         // in lower case: the name in the certificate, and the Host of HTTPS; "": the address
	Path string         // for HTTPS, beginning with a slash, possibly with a query
}

// OverTCP returns the resolver at a that is asked over TCP.
func OverTCP(a netip.AddrPort) Resolver { return Resolver{Addr: a} }

var (
	errResolver = errors.New("is not a resolver: write tcp://HOST[:PORT], tls://HOST[:PORT][#NAME], " +
		"https://HOST[:PORT]/PATH[#NAME] or tor")
	errHost = errors.New("has no usable address or host name")
	errPort = errors.New("needs a port from 1 to 65535")
	errPath = errors.New("has a path that is not valid in a URL")
)

// ParseResolver parses SCHEME://HOST[:PORT][/PATH][#NAME]. HOST is an address, with brackets around an IPv6 address
// if a port follows, or a name. NAME is the name in the certificate of a host that is given by its address. "tor"
// alone is a resolver, too. Errors have the form "has no port".
func ParseResolver(s string) (r Resolver, err error) {
	if s == kinds[Tor].scheme {
		return Resolver{Kind: Tor}, nil
	}
	scheme, rest, ok := strings.Cut(s, "://")
	for k := range kinds {
		if ok && Kind(k) != Tor && kinds[k].scheme == scheme {
			r.Kind, ok = Kind(k), false
		}
	}
	if ok || kinds[r.Kind].scheme != scheme {
		return Resolver{}, errResolver
	}
	rest, name, named := strings.Cut(rest, "#")
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		rest, r.Path = rest[:i], rest[i:]
	}
	switch {
	case r.Kind == HTTPS && r.Path == "":
		return Resolver{}, errors.New("has no path: most servers have it at /dns-query")
	case r.Kind != HTTPS && r.Path != "":
		return Resolver{}, errors.New("has a path, which only https:// has")
	case r.Kind == TCP && named:
		return Resolver{}, errors.New("has the name of a certificate, and tcp:// has none")
	}
	if r.Path != "" {
		u, err := url.ParseRequestURI(r.Path)
		if err != nil || u.RequestURI() != r.Path {
			return Resolver{}, errPath
		}
	}
	host, err := r.parseHost(rest)
	if err != nil {
		return Resolver{}, err
	}
	switch {
	case named && host != "":
		return Resolver{}, errors.New("has two names: behind # stands that of a host which is given by its address")
	case named:
		host = strings.ToLower(strings.TrimSuffix(name, "."))
		if !isHost([]byte(host)) || isNumber([]byte(host)) {
			return Resolver{}, errHost
		}
	}
	r.Name = host
	return r, nil
}

// parseHost parses HOST[:PORT], sets Addr, and returns the name if HOST is one.
func (r *Resolver) parseHost(s string) (name string, err error) {
	port := kinds[r.Kind].port
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil {
		r.Addr = netip.AddrPortFrom(a.Unmap(), port)
		return "", r.check()
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		r.Addr = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		return "", r.check()
	}
	if host, p, err := net.SplitHostPort(s); err == nil {
		// The digits are parsed like those of an address and port, which allows no signs and no service names.
		ap, err := netip.ParseAddrPort("0.0.0.0:" + p)
		if err != nil || ap.Port() == 0 {
			return "", errPort
		}
		s, port = host, ap.Port()
	}
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	if !isHost([]byte(s)) || isNumber([]byte(s)) {
		return "", errHost
	}
	r.Addr = netip.AddrPortFrom(netip.Addr{}, port)
	return s, nil
}

// check returns an error if r cannot be asked.
func (r Resolver) check() error {
	switch a := r.Addr.Addr(); {
	case r.Kind == Tor:
		return nil
	case int(r.Kind) >= len(kinds):
		return errResolver
	case r.Addr.Port() == 0:
		return errPort
	case !a.IsValid() && isHost([]byte(r.Name)):
		return nil
	case !a.IsValid(), a.IsUnspecified(), a.IsMulticast(), a.Zone() != "":
		return errHost
	}
	return nil
}

// String returns the form that ParseResolver reads, always with the port.
func (r Resolver) String() string {
	if int(r.Kind) >= len(kinds) {
		return fmt.Sprintf("Kind(%d)", r.Kind)
	}
	if r.Kind == Tor {
		return kinds[Tor].scheme
	}
	s := kinds[r.Kind].scheme + "://" + r.host() + r.Path
	if r.Addr.Addr().IsValid() && r.Name != "" {
		s += "#" + r.Name
	}
	return s
}

// host returns the HOST:PORT to dial.
func (r Resolver) host() string {
	if !r.Addr.Addr().IsValid() {
		return fmt.Sprintf("%s:%d", r.Name, r.Addr.Port())
	}
	return r.Addr.String()
}

// url returns the URL of a resolver of kind HTTPS.
func (r Resolver) url() *url.URL {
	u, err := url.ParseRequestURI(r.Path)
	if err != nil { // cannot happen after ParseResolver
		u = &url.URL{Path: r.Path}
	}
	u.Scheme, u.Host = "https", r.serverName()
	switch port := r.Addr.Port(); {
	case port != kinds[HTTPS].port:
		u.Host = net.JoinHostPort(u.Host, fmt.Sprint(port))
	case strings.Contains(u.Host, ":"):
		u.Host = "[" + u.Host + "]"
	}
	return u
}

// serverName returns the name that the certificate must be for.
func (r Resolver) serverName() string {
	if r.Name != "" {
		return r.Name
	}
	return r.Addr.Addr().String()
}
