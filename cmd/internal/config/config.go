package config

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/incoming"
	"github.com/viasocks/viasocks/cmd/internal/metrics"
	"github.com/viasocks/viasocks/cmd/internal/publish"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/tun"
)

// DefaultUpstream is the name of the upstream that --proxy defines.
const DefaultUpstream = "proxy"

type timeDuration = time.Duration

// Upstream is a named proxy.
type Upstream struct {
	Name   string
	Server socks.Server
	More   []socks.Server     // further servers of a group, after Server
	Group  socks.GroupOptions // without its name
	Via    string             // the upstream through which the servers are reached; empty: they are reached directly
}

// Servers returns all servers of u.
func (u *Upstream) Servers() []socks.Server { return append([]socks.Server{u.Server}, u.More...) }

// Host is what `up` does to the host besides the device, mark and table.
type Host struct {
	LAN              string          // direct, carry, refuse
	Resolved         bool            // tell systemd-resolved to ask viasocks
	Inbound          string          // keep, carry
	InboundPorts     []Range[uint16] // UDP ports of servers on this host
	Exclude, Include Selection       // an empty Include takes everything
	Strict, FailOpen bool
	StayClosed       bool
	Wait             bool // for a proxy that is not reachable yet
	NFTable          string
	DryRun           bool
	Confirm          time.Duration // 0: no confirmation is needed
	Takeover         bool          // from the viasocks that is up
	TakeoverLimit    time.Duration // how long that one may keep its flows
	Priority         int           // of the first ip rule
	ControlGroup     int           // negative: none
	MembersExclude   bool          // its members may exclude programs
	ExcludeUnits     []Unit        // of systemd
	DirectCarry      bool          // rules that say direct are applied by the data plane, and never by the kernel
}

// Selection selects traffic that matches any part of it.
type Selection struct {
	Nets    []netip.Prefix
	UIDs    []Range[uint32]
	Ports   []Range[uint16]
	Devices []string
	Cgroups []string // below the root of version 2, without a slash at either end
}

// Unit is a unit of systemd.
type Unit struct {
	Name string
	User *uint32 // the user whose service manager runs it; nil: the system's
}

// Fake tells whether and how names get addresses that stand for them.
type Fake struct {
	On    bool         // --dns fake
	Pool  netip.Prefix // of IPv4, inside flow.Pool4
	Pool6 netip.Prefix // a unique local range, at least as wide as a /64
	File  string       // keeps the names over a restart; empty: none
	IPv6  string       // auto, on, off: whether a name also has an IPv6 address
}

// Pools returns the networks whose addresses stand for names.
func (f *Fake) Pools() []netip.Prefix {
	if f.IPv6 == "off" {
		return []netip.Prefix{f.Pool}
	}
	return []netip.Prefix{f.Pool, f.Pool6}
}

// RuleFor is a flow that the user asks about, as written and parsed.
type RuleFor struct {
	Text string
	Flow route.Question
}

// Empty reports whether nothing was selected.
func (s *Selection) Empty() bool {
	return len(s.Nets)+len(s.UIDs)+len(s.Ports)+len(s.Devices)+len(s.Cgroups) == 0
}

// Range includes both First and Last.
type Range[T uint16 | uint32] struct{ First, Last T }

func (r Range[T]) String() string {
	if r.First == r.Last {
		return fmt.Sprint(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Config is the complete configuration of the user, checked. It does not change after Parse.
type Config struct {
	Command Command
	Program []string // run: the program and its arguments

	Upstreams []Upstream   // that of --proxy comes first
	Default   string       // upstream of flows that no rule matches; empty: they are refused
	Rules     []route.Rule // in the order given
	DNS       []dns.Resolver
	DNSOff    bool // port 53 is a port like others; DNS is then empty
	// questions go to the servers that the program asks, and to those of DNS only if those addresses cannot be real
	Relay    bool
	DNSRoots *x509.CertPool // verifies resolvers inside TLS; nil: the system's authorities
	Fake     Fake
	Split    route.Split // names that are looked up at other servers than DNS
	Search   []string    // run: the search list of the program's resolv.conf; nil: the host's
	Guard    bool        // there is an --allow: names that no rule needs are not resolved
	// ResolverDefault is the upstream through which resolvers are asked if no rule decides; empty: they are not
	// reached.
	ResolverDefault string

	ConnectTimeout, HandshakeTimeout time.Duration
	IdleTimeout, UDPTimeout          time.Duration
	SniffMode                        string // off, rules, name: see Sniff
	SniffPorts                       []uint16
	SniffWait                        time.Duration
	PingPorts                        []uint16 // empty: echo requests are not answered
	MaxPending, MaxPendingPerDest    int
	MaxMappings                      int
	Tuning                           socks.Tuning // Pool is the total for each proxy

	MTU          int
	Offload      tun.Mode
	UDPGSO       relay.GSO
	KeepProxyEnv bool
	Publish      []publish.Spec       // run
	ReachHost    ReachHost            // run
	Name         string               // run: for ps and exec
	Instance     string               // exec: the name or process id of a viasocks
	ReadyFD      int                  // run: gets a line when the program has its network; -1: none
	PIDFile      string               // run; empty: none
	Listen       []incoming.Spec      // run
	FTPActive    []uint16             // run: ports of FTP servers; empty: PORT and EPRT pass unchanged
	OnPort       string               // run: a program; empty: none
	Forwarded    []incoming.Forwarded // run
	STUN         []socks.Addr         // run, up
	RunAs        *RunAs               // run; nil: the caller
	Container    string               // attach, down: the name of a container, or the beginning of its id
	NetNS        string               // run, attach, down: a network namespace of ip-netns(8); empty: run makes one
	TUN          string
	Mark, Mask   uint32
	Table        int
	Host         Host
	File         string // of --config; empty: none

	StateDir string // of the journal, the lock and the control socket
	JSON     bool   // status, flows, ps
	PID      int    // status, flows: the viasocks to ask, 0: the one that is up; attach, down: a process in the namespace
	Limit    int    // flows
	Watch    bool   // flows: print events instead of a list

	AfterService bool // down

	RuleFor []RuleFor // check: flows to explain
	Import  []string  // check: files of Traffic Server, for ImportSocks

	Peers   []Peer           // doctor: addresses of one host behind the proxy
	Serve   bool             // doctor: be such a host
	ServeAt []netip.AddrPort // where; empty: everywhere
	// NamesDNS: the user has named the resolvers of DNS.
	NamesDNS bool

	LogLevel slog.Level
	LogFile  string // empty: standard error
	Metrics  metrics.Address
	// Decisions is the file that gets a line for each decision; empty: none.
	Decisions string
	Warnings  []string // logged once

	// NeedRestart names the options whose values differ from those that the daemon was started with, and that it does
	// not change: see Again.
	NeedRestart []string

	// Capture is what `capture` asks for; it goes to CaptureFile, "-" for standard output.
	Capture     control.Capture
	CaptureFile string

	captureFlow, captureBytes int // parts of Capture, until all options are read

	allow         []string
	excludeExes   []route.Rule     // come before Rules
	proxyAt       value            // kept until finish
	passwordFiles map[string]value // by upstream
	proxyCA       value
	dnsCA         value
	logLevelSet   bool
	kept          map[string][]value // of the options that a reload does not change
	given         map[string]bool    // options that have a value of the user
	unknownVars   []string           // variables of the environment that look like ours, until finish
}

// Gateway reports whether the program has a gateway that it can ask for ports.
func (c *Config) Gateway() bool { return len(c.Listen)+len(c.Forwarded) > 0 }

// AutoListen returns the Spec of --listen auto, and whether that is given.
func (c *Config) AutoListen() (incoming.Spec, bool) {
	if i := slices.IndexFunc(c.Listen, incoming.Spec.Auto); i >= 0 {
		return c.Listen[i], true
	}
	return incoming.Spec{}, false
}
