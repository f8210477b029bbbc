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

// Server describes a proxy: its place, protocol and credentials. It is a value and may be copied freely. The
// credentials are left out however it is printed or logged.
type Server struct {
	scheme  string
	proto   protocol
	host    string // a name, or an IP address without brackets; a zone follows a plain percent sign
	port    uint16
	path    string // of a unix socket, instead of host and port; a leading @ means an abstract one
	tls     bool
	ca      string // certificates in PEM that TLS trusts instead of the system's
	options options
	login   *login
}

// login hides the credentials behind two pointers, because fmt follows at most one, even where it cannot call our
// methods.
type login struct{ *userPass }

type userPass struct{ user, pass string }

func newLogin(user, pass string) *login { return &login{&userPass{user, pass}} }

// WithCredentials returns s with the given user and password instead of its own. RFC 1929 limits both to 255 bytes;
// the user must not be empty. SOCKS4 knows no passwords: remove it, and HTTP allows no colon in the user's name.
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

// TakesPassword reports whether the protocol can carry a password.
func (s Server) TakesPassword() bool { return s.proto == protoSOCKS5 || s.proto == protoHTTP }

// TakesNames reports whether the protocol can ask for a name instead of an address. All can, except SOCKS4 without
// the a.
func (s Server) TakesNames() bool { return s.proto != protoSOCKS4 }

// User returns the user name, which is empty without credentials. Do not log it.
func (s Server) User() string {
	if s.login == nil {
		return ""
	}
	return s.login.user
}

// Host returns the server's name or IP address. It is empty for a unix socket.
func (s Server) Host() string { return s.host }

// Port returns the server's TCP port. It is 0 for a unix socket.
func (s Server) Port() uint16 { return s.port }

// Unix returns the path of the server's unix socket, with @ for the leading zero byte of an abstract one. It is empty
// for a server that is reached by TCP.
func (s Server) Unix() string { return s.path }

// Protocol returns the name of the protocol: SOCKS5, SOCKS4, SOCKS4a or HTTP.
func (s Server) Protocol() string { return s.proto.String() }

// TLS reports whether the connection to the server is encrypted.
func (s Server) TLS() bool { return s.tls }

// UDPOverTCP reports whether datagrams go to the server inside a TCP connection (udp=over-tcp in its URL).
func (s Server) UDPOverTCP() bool { return s.options.uot }

// Where returns the server's place for messages: host:port, or the path of its socket.
func (s Server) Where() string {
	if s.path != "" {
		return s.path
	}
	return net.JoinHostPort(s.host, strconv.Itoa(int(s.port)))
}

// TLSConfig returns the TLS configuration for the server, or nil if it does not use TLS. Verification is always on.
func (s Server) TLSConfig() *tls.Config {
	if !s.tls {
		return nil
	}
	return s.tlsConfig()
}

// WithCA returns s with the certificates in pem, which TLS trusts instead of the system's.
func (s Server) WithCA(pem []byte) (Server, error) {
	if !x509.NewCertPool().AppendCertsFromPEM(pem) {
		return Server{}, errors.New("it contains no certificate in PEM format")
	}
	s.ca = string(pem)
	return s, nil
}

// addr returns the server's address if it is given as one.
func (s Server) addr() (netip.Addr, bool) {
	ip, err := netip.ParseAddr(s.host)
	return ip.Unmap(), err == nil
}

// String returns the URL without credentials.
func (s Server) String() string {
	if s.path != "" {
		return s.scheme + "://" + s.path
	}
	if s.host == "" {
		return "(no server)"
	}
	return s.scheme + "://" + net.JoinHostPort(strings.Replace(s.host, "%", "%25", 1), strconv.Itoa(int(s.port)))
}

// GoString returns the same as String, so that %#v shows no credentials.
func (s Server) GoString() string { return s.String() }

// LogValue returns the same as String, for slog.
func (s Server) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText returns the same as String, so that JSON shows no credentials.
func (s Server) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
