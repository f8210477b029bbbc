package socks

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// Server says where a SOCKS server is and how to log in. It is a value: copy it freely. However it is printed or
// logged, the credentials are left out.
type Server struct {
	scheme string
	host   string // a name or an IP address without brackets; a zone follows a plain percent sign
	port   uint16
	login  *login
}

// login is behind two pointers: fmt follows none or one, even where it can't call our methods.
type login struct{ *userPass }

type userPass struct{ user, pass string }

func newLogin(user, pass string) *login { return &login{&userPass{user, pass}} }

const defaultPort = 1080

var (
	errURL   = errors.New("it must read socks5://[user[:password]@]host[:port], with special characters of the password as %XX")
	errZone  = errors.New("a link-local address needs its device: socks5://[fe80::1%25eth0]:1080")
	errHost  = errors.New("an IPv6 address stands in brackets: socks5://[2001:db8::1]:1080")
	errLogin = errors.New("user (1 to 255 bytes) or password (at most 255 bytes) has the wrong length")
)

// ParseServer reads socks5://[user[:password]@]host[:port]; the port is 1080 when left out. socks5h is the same: names
// always travel as names here. No part of rawurl is repeated in an error, since any may be a password that was not
// escaped.
func ParseServer(rawurl string) (Server, error) {
	fail := func(err error) (Server, error) {
		return Server{}, fmt.Errorf("cannot use this proxy URL: %w", err)
	}
	u, err := url.Parse(escapeZone(rawurl))
	if err != nil {
		return fail(errURL)
	}
	var s Server
	switch scheme := strings.ToLower(u.Scheme); scheme {
	case "socks5", "socks5h":
		s.scheme = scheme
	case "socks": // what desktops write into ALL_PROXY, and mean SOCKS5 by
		s.scheme = "socks5"
	case "socks4", "socks4a", "unix", "http", "https":
		return fail(fmt.Errorf("%s is not supported yet, only socks5:// and socks5h://", scheme))
	default:
		return fail(errURL)
	}
	host := u.Hostname()
	if u.Opaque != "" || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.Fragment != "" || host == "" || len(host) > maxName {
		return fail(errURL)
	}
	if strings.Contains(host, ":") && !strings.HasPrefix(u.Host, "[") { // the last part was taken for the port
		return fail(errHost)
	}
	if ip, err := netip.ParseAddr(host); err == nil && needsZone(ip) {
		return fail(errZone)
	}
	s.host, s.port = host, defaultPort
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return fail(errURL)
		}
		s.port = uint16(n)
	}
	if u.User != nil {
		pass, _ := u.User.Password()
		if s, err = s.WithCredentials(u.User.Username(), pass); err != nil {
			return fail(err)
		}
	}
	return s, nil
}

// needsZone reports whether ip stands for different hosts on different devices, and does not say which.
func needsZone(ip netip.Addr) bool { return ip.Is6() && ip.IsLinkLocalUnicast() && ip.Zone() == "" }

// escapeZone writes %25 for the percent sign before the zone of an address in brackets (RFC 6874), which people write as the
// system prints it: [fe80::1%eth0].
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

// WithCredentials is s with a user and a password in place of those it had. Both lengths are limited to 255 bytes by
// RFC 1929; the user must not be empty.
func (s Server) WithCredentials(user, pass string) (Server, error) {
	if user == "" || len(user) > maxName || len(pass) > maxName {
		return Server{}, errLogin
	}
	s.login = newLogin(user, pass)
	return s, nil
}

// HasCredentials reports whether user and password are set.
func (s Server) HasCredentials() bool { return s.login != nil }

// User is the user name, empty without credentials. Not for logs.
func (s Server) User() string {
	if s.login == nil {
		return ""
	}
	return s.login.user
}

// Host is the server's name or IP address.
func (s Server) Host() string { return s.host }

// Port is the server's TCP port.
func (s Server) Port() uint16 { return s.port }

// addr is the server's address when it is given as one.
func (s Server) addr() (netip.Addr, bool) {
	ip, err := netip.ParseAddr(s.host)
	return ip.Unmap(), err == nil
}

// String is the URL without credentials.
func (s Server) String() string {
	if s.host == "" {
		return "(no server)"
	}
	return s.scheme + "://" + net.JoinHostPort(strings.Replace(s.host, "%", "%25", 1), strconv.Itoa(int(s.port)))
}

// GoString is String: %#v must not show more.
func (s Server) GoString() string { return s.String() }

// LogValue is String for slog.
func (s Server) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText is String: JSON must not show more.
func (s Server) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
