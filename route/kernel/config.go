package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"regexp"
	"time"
)

// LANMode tells what happens to traffic to private networks that the host is connected to.
type LANMode int

// The values of LANMode. LANDirect: reached past the proxy, except for names. LANCarry: reached through the proxy.
// LANRefuse: not reached at all.
const (
	LANDirect LANMode = iota
	LANCarry
	LANRefuse
)

// Marks are the packet marks and conntrack marks in use. They are values under one mask, so the bits of docker,
// Kubernetes, tailscale and others stay theirs.
type Marks struct {
	Mask     uint32
	Own      uint32 // our sockets; may leave the host to Config.Upstreams
	Direct   uint32 // our sockets for the verdict direct (Config.Direct), and excluded traffic; may go anywhere
	Captured uint32 // conntrack only: flows that began in the TUN
	Inbound  uint32 // answers to connections from outside
	Declined uint32 // conntrack only: flows from outside that do not get direct answers yet, see talk.go
	Bridged  uint32 // packet mark only: frames that cross a bridge from port to port
	Returned uint32 // packet mark only: packets of connections that the TUN opened, in both directions; see opened.go
}

// MarksFrom derives the other marks from that of our own sockets: own+1 to own+6 in units of the mask's lowest bit,
// wrapping around inside the mask and never 0. The mask needs at least three bits.
func MarksFrom(own, mask uint32) Marks {
	m := Marks{Mask: mask, Own: own}
	if mask == 0 {
		return m
	}
	unit := mask & -mask
	next := func(v uint32) uint32 {
		for {
			// Adding to the bits outside the mask carries across its gaps.
			if v = ((v | ^mask) + unit) & mask; v != 0 && v != own {
				return v
			}
		}
	}
	if mask&(mask-1) == 0 {
		return m
	}
	m.Direct = next(own)
	m.Captured = next(m.Direct)
	m.Inbound = next(m.Captured)
	m.Declined = next(m.Inbound)
	m.Bridged = next(m.Declined)
	m.Returned = next(m.Bridged)
	return m
}

// Selection selects traffic. Each entry of each field is an alternative.
type Selection struct {
	Networks []netip.Prefix // by destination
	UIDs     []UIDRange
	Ports    []PortRange // by destination, TCP and UDP
	Devices  []string    // traffic that comes in on it to be forwarded, or sockets bound to it
	Cgroups  []string    // paths below the cgroup2 mount: system.slice/chrony.service
}

// UIDRange and PortRange include both ends.
type (
	UIDRange  struct{ First, Last uint32 }
	PortRange struct{ First, Last uint16 }
)

func (s Selection) empty() bool {
	return len(s.Networks)+len(s.UIDs)+len(s.Ports)+len(s.Devices)+len(s.Cgroups) == 0
}

// Config tells what to do to the host. The zero value of a field stands for its default if one is named here, and is
// otherwise an error.
type Config struct {
	TUN      string       // name of the device that takes the packets; need not exist before Steer
	TUNAddrs []netip.Addr // its addresses, which are not reachable from the LAN
	Table    int          // number of the kernel routing table
	Priority int          // of the first ip rule; the next 19 are used too; 0: DefaultPriority
	NFTable  string       // name of the nftables tables; "": DefaultNFTable
	Marks    Marks

	LAN          LANMode
	CarryInbound bool        // answers to connections from outside are treated like other traffic
	InboundPorts []PortRange // UDP ports of servers: they answer directly, whatever they have sent
	Exclude      Selection   // goes past the proxy
	Include      Selection   // if not empty, only this goes through the proxy
	Strict       bool        // block AF_PACKET too
	Opens        bool        // the TUN opens connections to programs of this host, see opened.go; Change never clears it
	FailOpen     bool        // the filter lets everything pass when nothing has renewed the guard for Guard

	LocalDNS  netip.Addr // a loopback address whose port 53 leads out of the namespace, see localdns.go; invalid: none
	DNSServer netip.Addr // whom its questions go to instead, by the TUN; invalid: nobody

	Upstreams []Endpoint // what sockets with the mark Own may reach: proxies, their relays, resolvers for their names
	PortMap   uint16     // the UDP port of NAT-PMP and PCP, which leads into the TUN as port 53 does; 0: no such port
	Direct    bool       // rules use the verdict direct: our sockets with that mark may go anywhere
	// Straight goes past the proxy by rules that need Direct. It does not concern Reserved: addresses that stand for names.
	Straight []Straight
	Units    []Unit // their processes go past the proxy
	Reserved []netip.Prefix

	OwnUID    *uint32  // our sockets have this uid; nil: not checked
	OwnCgroup string   // our sockets belong to this cgroup; "": not checked
	Kept      []Tuple  // connections from before, see Established
	Live      bool     // another viasocks carries the host until now and hands it over, see Host.HandOver
	Lock      *os.File // of that viasocks; nil: New takes it

	groups map[string]cgroup // control groups by path, as the filter knows them; see cgroup
	live   []liveGroup       // control groups that come and go while the host is steered

	Dir   string        // of the journal; "": /run/viasocks
	Guard time.Duration // how long after the last renewal the TUN still swallows packets, before programs get errors; 0: 10 s

	// A Config in another process is sent as JSON, without these.
	Log            *slog.Logger `json:"-"` // nil: none
	Alive          func() bool  `json:"-"` // called before the guard is renewed; nil: always true. Must not block
	OnDefaultRoute func()       `json:"-"` // called when a default route of main has changed. Must not block
}

// Endpoint is a destination that our sockets may reach.
type Endpoint struct {
	Proto uint8          // IPPROTO_TCP, IPPROTO_UDP; 0: both
	Addr  netip.AddrPort // port 0: any
}

// Tuple is a connection, seen from this host.
type Tuple struct {
	Proto         uint8 // IPPROTO_TCP, IPPROTO_UDP
	Local, Remote netip.AddrPort
	Out           bool // opened by this host, so not from outside, whichever end speaks first
}

// Defaults and limits.
const (
	// Protocol marks our ip rules and kernel routes (`proto 118` in the output of ip), so that ours are recognized
	// and nothing else is touched. /etc/iproute2/rt_protos does not use this number.
	Protocol = 118
	// DefaultPriority is the priority of the first ip rule. A rule that is added without a priority gets one before
	// the first existing rule, so ours stay well behind those of VPNs (tailscale: 5210 and above) and before main
	// (32766).
	DefaultPriority = 9000
	DefaultNFTable  = "viasocks"
	DefaultTUN      = "viasocks0"
	DefaultDir      = "/run/viasocks"
	DefaultGuard    = 10 * time.Second
)

// ErrRunning means that another daemon holds the lock of this network namespace.
var ErrRunning = errors.New("cannot steer the host: another viasocks steers it: see 'viasocks status'")

// maxList limits each list of a Selection, because each entry is checked for each packet or route look-up.
const maxList = 256

var nameRE = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,30}$`)

// withDefaults fills in the defaults, and returns an error if a field is invalid.
func (c Config) withDefaults() (Config, error) {
	if c.Priority == 0 {
		c.Priority = DefaultPriority
	}
	if c.NFTable == "" {
		c.NFTable = DefaultNFTable
	}
	if c.Dir == "" {
		c.Dir = DefaultDir
	}
	if c.Guard == 0 {
		c.Guard = DefaultGuard
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Strict && c.LAN == LANDirect {
		c.LAN = LANRefuse
	}
	return c, c.validate()
}

func (c *Config) validate() error {
	m := c.Marks
	values := []uint32{m.Own, m.Direct, m.Captured, m.Inbound, m.Declined, m.Bridged, m.Returned}
	for i, v := range values {
		if v == 0 || v&^m.Mask != 0 {
			return fmt.Errorf(
				"cannot use mark %#x/%#x: seven values other than 0 must fit into the mask: it needs three bits or more",
				m.Own,
				m.Mask,
			)
		}
		for _, w := range values[:i] {
			if v == w {
				return fmt.Errorf("cannot use mark %#x twice: the seven marks must differ", v)
			}
		}
	}
	switch {
	case c.TUN == "" || len(c.TUN) > 15:
		return fmt.Errorf("cannot use TUN device name %q: 1 to 15 bytes", c.TUN)
	case c.Table <= 0 || c.closedTable() >= 253 && c.Table <= 255:
		return fmt.Errorf("cannot use tables %d and %d: 253 to 255 belong to the kernel: choose another number with --table",
			c.Table, c.closedTable())
	case c.Priority < 1 || c.Priority+lastRule >= 32766:
		return fmt.Errorf("cannot use rule priority %d: 1 to %d, before the rule of main", c.Priority, 32765-lastRule)
	case !nameRE.MatchString(c.NFTable):
		return fmt.Errorf("cannot use nftables name %q: letters, digits, '_', '-', '.', at most 31", c.NFTable)
	case c.Guard < time.Second:
		return fmt.Errorf("cannot use a guard of %v: a second or more", c.Guard)
	}
	for _, s := range []*Selection{&c.Exclude, &c.Include} {
		for _, n := range []int{len(s.Networks), len(s.UIDs), len(s.Ports), len(s.Devices), len(s.Cgroups)} {
			if n > maxList {
				return fmt.Errorf("cannot include or exclude by %d things of a kind: at most %d", n, maxList)
			}
		}
	}
	if len(c.Units) > maxList {
		return fmt.Errorf("cannot exclude %d units: at most %d", len(c.Units), maxList)
	}
	if len(c.Straight) > MaxStraight || len(c.Straight) > 0 && !c.Direct {
		return fmt.Errorf("cannot let %d kinds of traffic out by rules: at most %d, and rules must be direct",
			len(c.Straight), MaxStraight)
	}
	if len(c.InboundPorts) > maxList {
		return fmt.Errorf("cannot use %d ranges of inbound ports: at most %d", len(c.InboundPorts), maxList)
	}
	if len(c.Upstreams) > maxEndpoints {
		return fmt.Errorf("cannot open the filter for %d upstream endpoints: at most %d", len(c.Upstreams), maxEndpoints)
	}
	return nil
}

// maxEndpoints limits the set of upstream endpoints.
const maxEndpoints = 4096
