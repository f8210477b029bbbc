package socks

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Server says where a proxy is, what it speaks and how to log in. It is a value: copy it freely. However it is printed or
// logged, the credentials are left out.
type Server struct {
	scheme  string
	proto   protocol
	host    string // a name or an IP address without brackets; a zone follows a plain percent sign
	port    uint16
	path    string // of a unix socket, in place of host and port; an @ begins an abstract one
	tls     bool
	ca      string // certificates in PEM that TLS trusts in place of the system's
	options options
	login   *login
}

// login is behind two pointers: fmt follows none or one, even where it can't call our methods.
type login struct{ *userPass }

type userPass struct{ user, pass string }

func newLogin(user, pass string) *login { return &login{&userPass{user, pass}} }

// WithCredentials is s with a user and a password in place of those it had. Both lengths are limited to 255 bytes by
// RFC 1929; the user must not be empty. SOCKS4 has a user and no password, and HTTP no colon in the user's name.
func (s Server) WithCredentials(user, pass string) (Server, error) {
	switch {
	case user == "" || len(user) > maxName || len(pass) > maxName:
		return Server{}, errLogin
	case (s.proto == protoSOCKS4 || s.proto == protoSOCKS4a) && pass != "":
		return Server{}, errLogin4
	case (s.proto == protoSOCKS4 || s.proto == protoSOCKS4a) && strings.ContainsRune(user, 0):
		return Server{}, errUser4
	case s.proto == protoHTTP && strings.ContainsRune(user, ':'):
		return Server{}, errUserHTTP
	}
	s.login = newLogin(user, pass)
	return s, nil
}

// HasCredentials reports whether user and password are set.
func (s Server) HasCredentials() bool { return s.login != nil }

// HasPassword reports whether the credentials have a password.
func (s Server) HasPassword() bool { return s.login != nil && s.login.pass != "" }

// TakesPassword reports whether the protocol has room for a password.
func (s Server) TakesPassword() bool { return s.proto == protoSOCKS5 || s.proto == protoHTTP }

// TakesNames reports whether the protocol can ask for a name in place of an address: all but SOCKS4 without the a.
func (s Server) TakesNames() bool { return s.proto != protoSOCKS4 }

// User is the user name, empty without credentials. Not for logs.
func (s Server) User() string {
	if s.login == nil {
		return ""
	}
	return s.login.user
}

// Host is the server's name or IP address; empty for a unix socket.
func (s Server) Host() string { return s.host }

// Port is the server's TCP port; 0 for a unix socket.
func (s Server) Port() uint16 { return s.port }

// Unix is the path of the server's unix socket; an @ stands for the zero byte that begins an abstract one. It is empty for a
// server that is reached by TCP.
func (s Server) Unix() string { return s.path }

// Protocol is the name of what is spoken with the server: SOCKS5, SOCKS4, SOCKS4a or HTTP.
func (s Server) Protocol() string { return s.proto.String() }

// TLS reports whether the connection to the server is encrypted.
func (s Server) TLS() bool { return s.tls }

// UDPOverTCP reports whether datagrams go to the server inside a TCP connection, as its URL says by udp=over-tcp.
func (s Server) UDPOverTCP() bool { return s.options.uot }

// Where is the server for messages: host:port, or the path of its socket.
func (s Server) Where() string {
	if s.path != "" {
		return s.path
	}
	return net.JoinHostPort(s.host, strconv.Itoa(int(s.port)))
}

// TLSConfig is how TLS is spoken with the server; nil: it is not. Verification is always on.
func (s Server) TLSConfig() *tls.Config {
	if !s.tls {
		return nil
	}
	return s.tlsConfig()
}

// WithCA is s with the certificates in pem trusted for TLS in place of the system's.
func (s Server) WithCA(pem []byte) (Server, error) {
	if !x509.NewCertPool().AppendCertsFromPEM(pem) {
		return Server{}, errors.New("there is no certificate in PEM in it")
	}
	s.ca = string(pem)
	return s, nil
}

// addr is the server's address when it is given as one.
func (s Server) addr() (netip.Addr, bool) {
	ip, err := netip.ParseAddr(s.host)
	return ip.Unmap(), err == nil
}

// String is the URL without credentials.
func (s Server) String() string {
	if s.path != "" {
		return s.scheme + "://" + s.path
	}
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
