package socks

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// Default ports of URLs.
const (
	defaultPort  = 1080
	defaultHTTP  = 80
	defaultHTTPS = 443
)

// maxPath is the room in sockaddr_un, less the zero byte at either end.
const maxPath = 107

// The errors of ParseServer. They contain no part of the URL.
var (
	errURL = errors.New(
		"it must read SCHEME://[user[:password]@]host[:port], with special characters of the password as %XX",
	)
	errScheme = errors.New("it must begin with socks5:// (as in socks5://127.0.0.1:1080), socks5h://, socks4://, socks4a://, " +
		"http:// or https://")
	errUnix = errors.New(
		"the path of a unix socket is needed, as in socks5+unix:///run/proxy.sock or socks5+unix://@abstract",
	)
	errZone     = errors.New("a link-local address needs its device: socks5://[fe80::1%25eth0]:1080")
	errHost     = errors.New("an IPv6 address stands in brackets: socks5://[2001:db8::1]:1080")
	errLogin    = errors.New("user (1 to 255 bytes) or password (at most 255 bytes) has the wrong length")
	errLogin4   = errors.New("SOCKS4 knows no passwords: remove it")
	errUser4    = errors.New("a SOCKS4 user cannot contain a zero byte")
	errUserHTTP = errors.New("an HTTP user cannot contain a colon")
	errCarrier  = errors.New("only socks5, socks4 and socks4a have +tls, and they and http have +unix")
)

// ParseServer parses SCHEME://[user[:password]@]host[:port]. SCHEME is socks5 or socks5h (the two are the same here,
// since names always travel as names), socks (SOCKS5, as desktops write it), socks4, socks4a, http or https. The
// default port is 1080, 80 or 443. A scheme with +tls is SOCKS inside TLS. With +unix, the path of a socket, or @ and
// the name of an abstract one, follows the user. No part of rawurl appears in an error, since any part may be a
// password that was not escaped.
func ParseServer(rawurl string) (Server, error) {
	s, err := parseServer(rawurl)
	if err != nil {
		return Server{}, fmt.Errorf("cannot use this proxy URL: %w", err)
	}
	return s, nil
}

func parseServer(rawurl string) (Server, error) {
	scheme, rest, ok := strings.Cut(rawurl, "://")
	if !ok {
		return Server{}, errScheme
	}
	s, err := parseScheme(strings.ToLower(scheme))
	if err != nil {
		return Server{}, err
	}
	before, query, _ := strings.Cut(rest, "?")
	if s.path != "" {
		s, err = s.parseUnix(before)
	} else {
		s, err = s.parseHost(scheme + "://" + before)
	}
	if err != nil {
		return Server{}, err
	}
	return s.withOptions(query)
}

// parseScheme returns a Server with what the scheme tells. If its path is not empty, the path of a socket must
// follow.
func parseScheme(scheme string) (s Server, err error) {
	base, carrier, _ := strings.Cut(scheme, "+")
	s.scheme, s.port = scheme, defaultPort
	switch base {
	case "socks": // desktops write this into ALL_PROXY and mean SOCKS5
		s.scheme = "socks5" + strings.TrimPrefix(scheme, base)
	case "socks5", "socks5h":
	case "socks4":
		s.proto = protoSOCKS4
	case "socks4a":
		s.proto = protoSOCKS4a
	case "http":
		s.proto, s.port = protoHTTP, defaultHTTP
	case "https":
		s.proto, s.port, s.tls = protoHTTP, defaultHTTPS, true
	default:
		return Server{}, errScheme
	}
	switch {
	case carrier == "" && base == scheme:
	case carrier == "unix" && !s.tls:
		s.path, s.port = "@", 0
	case carrier == "tls" && s.proto != protoHTTP:
		s.tls = true
	default:
		return Server{}, errCarrier
	}
	return s, nil
}

// parseHost parses a URL whose scheme gave s.
func (s Server) parseHost(rawurl string) (Server, error) {
	u, err := url.Parse(escapeZone(rawurl))
	if err != nil {
		return Server{}, errURL
	}
	host := u.Hostname()
	if u.Opaque != "" || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.Fragment != "" || host == "" ||
		len(host) > maxName {
		return Server{}, errURL
	}
	if strings.Contains(host, ":") && !strings.HasPrefix(u.Host, "[") { // the last part was taken for the port
		return Server{}, errHost
	}
	if ip, err := netip.ParseAddr(host); err == nil && needsZone(ip) {
		return Server{}, errZone
	}
	s.host = host
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return Server{}, errURL
		}
		s.port = uint16(n)
	}
	return s.withUserinfo(u.User)
}

// parseUnix parses what follows the scheme: [user[:password]@]/path or [user[:password]@]@name. Special characters
// are escaped by %XX, also in the path.
func (s Server) parseUnix(rest string) (Server, error) {
	var user *url.Userinfo
	if rest != "" && rest[0] != '/' && rest[0] != '@' {
		login, path, ok := strings.Cut(rest, "@")
		if !ok || path == "" || path[0] != '/' && path[0] != '@' {
			return Server{}, errUnix
		}
		u, err := url.Parse("socks5://" + login + "@host")
		if err != nil || u.Host != "host" {
			return Server{}, errUnix
		}
		user, rest = u.User, path
	}
	path, err := url.PathUnescape(rest)
	if err != nil || len(path) < 2 || len(path) > maxPath || strings.ContainsAny(path, "\x00?#") {
		return Server{}, errUnix
	}
	s.path = path
	return s.withUserinfo(user)
}

func (s Server) withUserinfo(u *url.Userinfo) (Server, error) {
	if u == nil {
		return s, nil
	}
	pass, _ := u.Password()
	return s.WithCredentials(u.Username(), pass)
}

// needsZone reports whether ip means different hosts on different devices and has no zone.
func needsZone(ip netip.Addr) bool { return ip.Is6() && ip.IsLinkLocalUnicast() && ip.Zone() == "" }

// escapeZone writes %25 for the percent sign before the zone of an address in brackets (RFC 6874). People write the
// zone as the system prints it: [fe80::1%eth0].
func escapeZone(rawurl string) string {
	open := strings.LastIndexByte(rawurl, '[')
	if open < 1 || !strings.ContainsRune("/@", rune(rawurl[open-1])) || strings.Contains(rawurl[open:], "@") {
		return rawurl // no address in brackets: it may be in a password
	}
	length := strings.IndexByte(rawurl[open:], ']')
	zone := strings.IndexByte(rawurl[open:], '%')
	if zone < 0 || zone > length || strings.HasPrefix(rawurl[open+zone:], "%25") {
		return rawurl
	}
	return rawurl[:open+zone] + "%25" + rawurl[open+zone+1:]
}
