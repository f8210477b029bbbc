package route

import (
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
)

// Config is the configuration of a Router.
type Config struct {
	Upstreams []Upstream // their names must differ; the one named "direct" is that of the verdict direct
	Rules     []Rule     // the first one that matches decides
	Default   string     // upstream of flows that no rule matches; "": they are refused

	Loops   []*relay.Loop // at least one; the caller runs them until after the Router was closed
	Shards  int           // those of the stack, which HandleStream and others name; they share the loops. 0: one
	Sockets flow.Sockets  // nil: the app's sockets cannot be queried
	Owners  flow.Owners   // nil: the owners of the app's sockets cannot be found
	// Decisions gets one JSON object on a line for each verdict on a flow, from one goroutine. If the writer is too
	// slow, lines are lost and nothing is delayed. nil: not wanted.
	Decisions io.Writer
	// ComesBack reports whether the socket that began a flow belongs to a proxy, so that carrying it would never end;
	// the flow is then refused. It is called for each new stream and each new mapping, on the frame reader. nil: this
	// cannot happen.
	ComesBack func(flow.Flow) bool
	// OwnPort reports whether the proxy listens for the program at an endpoint. A program that connects to its own such
	// endpoint is refused: it would take the only peer that the proxy accepts there. It is called for each new stream, on
	// the frame reader. nil: there is no such endpoint.
	OwnPort func(netip.AddrPort) bool
	// Asks reports whether the program at an address may ask for ports. It is called for each request. If it is set, a
	// request may go to any address. nil: all programs may ask, and they ask flow.Gateway4.
	Asks func(netip.Addr) bool
	// Resolvers answer port 53. They are asked through the upstream that the rules choose. Empty: port 53 is a port
	// like others.
	Resolvers []dns.Resolver
	// RelayDNS means that questions go to the servers that the app asks, and to Resolvers only if those addresses
	// cannot be real.
	RelayDNS bool
	// ResolverCAs are the certificates by which resolvers inside TLS are verified; nil: the system's authorities.
	ResolverCAs *x509.CertPool
	// ResolverDefault is the upstream for connections to Resolvers that no rule matches; "": that of Default.
	ResolverDefault string
	// Guard refuses DNS questions for names that no rule may need, and all DNS operations except questions, because
	// they would be a way out past the rules.
	Guard bool
	// Split tells which names are looked up at other servers than Resolvers.
	Split Split
	// HostDNS asks servers past every upstream; with its zero value that is not possible. With Fake, names that the
	// rules send direct are looked up at its Servers.
	HostDNS HostDNS
	// Pool contains the fake addresses. A TCP flow to one of them travels as the name that it stands for. nil: there
	// are none.
	Pool *dns.Pool
	// Fake means that questions for addresses are answered from Pool, which must not be nil. Otherwise addresses that
	// were given out before still stand for their names.
	Fake bool
	// NoFakeIPv6 means that names have only a fake IPv4 address.
	NoFakeIPv6 bool
	// LearnFakeIPv6 means that names have no fake IPv6 address while flows show that the upstream that carries them
	// cannot reach IPv6.
	LearnFakeIPv6 bool
	// Host tells which services of the host may be reached; nil: none.
	Host *HostServices
	// UDPTimeout is how long a mapping lives after its last datagram if its socket is gone. 0: DefaultUDPTimeout.
	UDPTimeout time.Duration
	Limits     Limits
	Log        *slog.Logger // nil: none
}

// Limits limit the resources that the app can make us hold. Zero means the default.
type Limits struct {
	Flows        int // TCP flows, including pending ones; default 65,536, or what RLIMIT_NOFILE allows
	Mappings     int // UDP mappings; default DefaultMappings, or what RLIMIT_NOFILE allows
	Associations int // that may be pending at the same time; default 256
}

// DefaultMappings is the limit of UDP mappings if enough files may be open.
const DefaultMappings = 8192

// openFiles returns how many files may be open, up to a large number.
func openFiles() int {
	files := 1 << 20
	var rl unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err == nil && rl.Cur < uint64(files) {
		files = int(rl.Cur)
	}
	return files
}

func defaultMappings(files int) int { return max(min(DefaultMappings, files/8), 16) }

// fill sets the defaults, except that of Mappings, which SetUDP sets. A flow holds one descriptor, a mapping two (the
// control connection and the UDP socket). The mappings get a quarter of the descriptors, the flows three fifths, and
// the rest is for everything else.
func (l *Limits) fill() error {
	if l.Flows < 0 || l.Mappings < 0 || l.Associations < 0 {
		return errors.New("cannot use a limit below 0")
	}
	if l.Flows == 0 {
		l.Flows = min(65536, openFiles()*3/5)
	}
	if l.Associations == 0 {
		l.Associations = 256
	}
	return nil
}
