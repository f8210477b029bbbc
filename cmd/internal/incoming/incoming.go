package incoming

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
)

// Limits and times. The times are variables for tests.
const (
	// MaxOpen limits the connections of peers that one port has at a time. Over it, no BIND is made.
	MaxOpen = 256
	// maxPorts limits the ports that programs can ask for.
	maxPorts = 64
	// bindWait is how long one BIND waits for its peer. A server that gives every BIND another port changes what is
	// announced after this time.
	bindWait = 6 * time.Hour
	// settled is how long a server must listen until it is asked again soon after a failure.
	settled = time.Minute
)

var (
	// bindPause is the least time between two BINDs of one port, whatever the server does.
	bindPause = 20 * time.Millisecond
	// retryFirst to retryMost is the pause after a BIND that failed; retryUnable after one that the server cannot do.
	retryFirst, retryMost, retryUnable = time.Second, 5 * time.Minute, 10 * time.Minute
)

// Binder asks a server to listen: see socks.Group.Bind.
type Binder interface {
	Bind(ctx context.Context, l *loop.Loop, dst socks.Addr, wait time.Duration, bound func(netip.AddrPort),
		done func(fd int, peer netip.AddrPort, err error))
}

// Config is the configuration of a Manager.
type Config struct {
	Loop   *loop.Loop                   // BINDs wait on it
	Binder func(upstream string) Binder // nil: there is no such upstream, or it is direct
	// Default is the upstream of a Spec that names none.
	Default string
	// Deliver opens the connection of peer to the program's port and takes ownership of sock. ended is called once, unless
	// Deliver returns an error. Deliver runs on a goroutine of its own and may block for a short time.
	Deliver func(s Spec, peer netip.AddrPort, sock loop.Socket, ended func(relay.Result)) error
	// KeepUDP keeps the mapping of a UDP port of the program; see route.Router.KeepUDP. nil: UDP ports are refused.
	KeepUDP func(app netip.AddrPort, upstream string, tell func(route.Outer)) (end func())
	// App returns the endpoint of the program that listens at a port.
	App func(port uint16) netip.AddrPort
	// CanBePeer reports whether a peer may have the address.
	CanBePeer func(netip.Addr) bool
	// Announce is called when a port is reached at another endpoint than before. at is the endpoint for IPv4 and at6 the
	// one for IPv6; an invalid one means that peers cannot reach the port. It must not block. nil: nobody is told.
	Announce func(s Spec, at, at6 netip.AddrPort)
	NoIPv6   bool // the program has no IPv6
	Log      *slog.Logger
}

// Counters count what came to all ports; see package count.
type Counters[T any] struct {
	Accepted T `metric:"incoming_total" label:"result=accepted" help:"Connections of peers by way of BIND."`
	Refused  T `metric:"incoming_total" label:"result=refused_by_program"`
	Bogus    T `metric:"incoming_total" label:"result=impossible_peer" lost:"peers with an impossible address"`
	Failed   T `metric:"binds_failed_total" help:"BIND requests that failed."`
}

// Manager keeps the BINDs of all ports. Its methods may be called from any goroutine.
type Manager struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	count  Counters[atomic.Uint64]
	busy   sync.WaitGroup // BINDs whose done has not been called
	held   sync.Map       // from the endpoint at which a server listens, a netip.AddrPort, to its *wait

	mu    sync.Mutex
	over  bool
	ports []*port
	udp   map[netip.AddrPort]*udpPort
}

// Start makes a BIND for each of specs. The caller closes the Manager, before the loop ends.
func Start(cfg Config, specs []Spec) *Manager {
	m := &Manager{cfg: cfg}
	if m.cfg.Log == nil {
		m.cfg.Log = slog.New(slog.DiscardHandler)
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	for _, s := range specs {
		switch {
		case s.Auto():
		case s.Proto == portmap.UDP:
			m.mu.Lock()
			m.keepListed(m.named(s))
			m.mu.Unlock()
		default:
			m.Add(s, s.Port)
		}
	}
	return m
}

// Add makes BINDs for one more port of the program, unless it has them already. ask is the port that the server is asked
// for.
func (m *Manager) Add(s Spec, ask uint16) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.add(s, ask)
}

// add is Add. The caller holds mu.
func (m *Manager) add(s Spec, ask uint16) {
	s = m.named(s)
	if m.over || m.find(s.Port) != nil {
		return
	}
	p := &port{m: m, spec: s, ask: ask, waiting: map[*wait]struct{}{}, used: map[uint16]int{}}
	if !m.cfg.NoIPv6 {
		// No gateway tells the program of another port of IPv6: peers look for it at its own.
		p.six = &port{m: m, spec: s, ask: s.Port, waiting: map[*wait]struct{}{}, used: map[uint16]int{}, four: p}
	}
	m.ports = append(m.ports, p)
	for _, u := range m.udp {
		if u.app.Port() == s.Port && u.now.At.IsValid() {
			m.follow(u, u.now.At.Port())
		}
	}
	p.after(0)
}

// find returns the port with that number, or nil. The caller holds mu.
func (m *Manager) find(n uint16) *port {
	for _, p := range m.ports {
		if p.spec.Port == n {
			return p
		}
	}
	return nil
}

// Set makes the BINDs and UDP ports for specs. It ends all others, except for those that a program asked for. def is the
// upstream of a Spec that names none. Ports that do not change are not disturbed, and open connections go on.
func (m *Manager) Set(specs []Spec, def string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cfg.Default = def
	wanted := map[Spec]bool{}
	for _, s := range specs {
		wanted[m.named(s)] = true
	}
	for _, p := range slices.Clone(m.ports) {
		if !p.asked && !wanted[p.spec] {
			m.remove(p.spec.Port)
		}
	}
	for _, s := range specs {
		if s.Auto() || s.Proto == portmap.UDP {
			continue
		}
		if p := m.find(s.Port); p != nil && p.spec != m.named(s) {
			m.remove(s.Port)
		}
		m.add(s, s.Port)
		if p := m.find(s.Port); p != nil {
			p.asked = false
		}
	}
	m.setUDP(specs, wanted)
}

// named returns s with the default upstream if it names none. The caller holds mu.
func (m *Manager) named(s Spec) Spec {
	if s.Upstream == "" {
		s.Upstream = m.cfg.Default
	}
	return s
}

// Renew makes the BINDs again of those upstreams for which concerns returns true, because the connections on which they wait
// may be dead. Open connections of peers go on.
func (m *Manager) Renew(concerns func(upstream string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.ports {
		if concerns(p.spec.Upstream) {
			p.renew()
		}
	}
}

// Remove ends the BINDs of a port. Its open connections go on.
func (m *Manager) Remove(n uint16) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.remove(n)
}

// remove is Remove. The caller holds mu.
func (m *Manager) remove(n uint16) {
	for i, p := range m.ports {
		if p.spec.Port == n {
			m.ports = append(m.ports[:i:i], m.ports[i+1:]...)
			p.end()
			return
		}
	}
}

// Close ends all BINDs and waits for that. Open connections belong to the router.
func (m *Manager) Close() {
	m.cancel()
	m.mu.Lock()
	m.over = true
	for _, p := range m.ports {
		p.end()
	}
	for _, u := range m.udp {
		u.end()
	}
	m.mu.Unlock()
	m.busy.Wait()
}

// Status is the state of one port.
type Status struct {
	Spec
	Outer   netip.AddrPort // where peers reach it; invalid: nowhere
	Waiting int            // BINDs that wait for a peer
	Open    int            // connections of peers
	Why     string         // why the last BIND or probe failed; empty after one that did not
	Outer6  netip.AddrPort // where peers reach it by IPv6; invalid: nowhere
	Why6    string         // why it has no BIND for IPv6; empty: it has one, or none was tried
	Filter  route.Filter   // UDP: who may send to Outer
}

// Ports returns the state of each port.
func (m *Manager) Ports() (all []Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.ports {
		s := Status{Spec: p.spec, Outer: p.outer, Waiting: len(p.waiting), Open: p.open}
		if p.why != nil {
			s.Why = p.why.Error()
		}
		if six := p.six; six != nil {
			s.Waiting, s.Open, s.Outer6 = s.Waiting+len(six.waiting), s.Open+six.open, six.outer
			if six.why != nil {
				s.Why6 = six.why.Error()
			}
		}
		all = append(all, s)
	}
	udp := slices.SortedFunc(maps.Values(m.udp), func(a, b *udpPort) int { return a.app.Compare(b.app) })
	for _, u := range udp {
		s := Status{Spec: u.spec, Outer: u.now.At, Filter: u.now.Filter}
		if u.now.Err != nil {
			s.Why = u.now.Err.Error()
		}
		all = append(all, s)
	}
	return all
}

// Outer returns where the port can be reached, or an invalid endpoint.
func (m *Manager) Outer(n uint16) netip.AddrPort {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.find(n); p != nil {
		return p.outer
	}
	return netip.AddrPort{}
}

// Holds reports whether a BIND waits for its peer at an endpoint. m may be nil. It takes no lock: it is called for each new
// flow of TCP.
func (m *Manager) Holds(at netip.AddrPort) bool {
	if m == nil {
		return false
	}
	_, waits := m.held.Load(at)
	return waits
}

// Stats returns the counters.
func (m *Manager) Stats() (c Counters[uint64]) {
	if m != nil {
		c = Counters[uint64]{m.count.Accepted.Load(), m.count.Refused.Load(), m.count.Bogus.Load(), m.count.Failed.Load()}
	}
	return c
}
