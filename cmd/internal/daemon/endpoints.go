package daemon

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

// endpoint is where a socket of ours may go. Port 0 is any.
type endpoint struct {
	Proto flow.Proto
	Addr  netip.AddrPort
}

// endpoints is the set of them: the proxies' addresses, the relays that they named, and the resolvers that know the
// proxies' names. The filter holds the same set, so that nobody gets out by putting our mark on a packet. What becomes
// known is in the filter before the first packet goes there. Its methods may be called from any goroutine.
type endpoints struct {
	log *slog.Logger

	mu      sync.Mutex
	servers []socks.Server      // of the configuration
	known   map[endpoint]string // who it belongs to: a server, or resolvers
	ports   map[netip.Addr]int  // of relays at this address
	gen     uint64              // counts changes

	applying sync.Mutex
	apply    func([]endpoint) error // nil: there is no filter
	applied  uint64
}

// A proxy that gives each association a port of its own has thousands: from relayMany on the relay's address stands with
// any port. maxEndpoints bounds what a resolver or a proxy can make us hold.
const (
	relayMany    = 256
	maxEndpoints = 4096
	resolvers    = "resolvers" // no server's name: those have a scheme
)

func newEndpoints(log *slog.Logger) *endpoints {
	return &endpoints{log: log, known: map[endpoint]string{}, ports: map[netip.Addr]int{}}
}

// configure says which proxies there are. Those given by address are in the set from here on; what belongs to others is
// taken out.
func (e *endpoints) configure(ups []config.Upstream) {
	e.mu.Lock()
	e.servers = nil
	owners := map[string]bool{resolvers: true}
	for _, u := range ups {
		owners[u.Server.String()] = true
		e.servers = append(e.servers, u.Server)
	}
	for at, owner := range e.known {
		if !owners[owner] {
			delete(e.known, at)
			delete(e.ports, at.Addr.Addr())
			e.gen++
		}
	}
	for _, s := range e.servers {
		if a, err := netip.ParseAddr(s.Host()); err == nil {
			e.add(s.String(), endpoint{flow.TCP, netip.AddrPortFrom(a.Unmap(), s.Port())})
		}
	}
	e.mu.Unlock()
	e.push()
}

// add takes one in; e.mu is held. It reports whether it is in.
func (e *endpoints) add(owner string, at endpoint) bool {
	if _, known := e.known[at]; known {
		return true
	}
	if len(e.known) >= maxEndpoints {
		return false
	}
	e.known[at] = owner
	e.gen++
	return true
}

// has: e.mu is held.
func (e *endpoints) has(at endpoint) bool {
	if _, ok := e.known[at]; ok {
		return true
	}
	_, ok := e.known[endpoint{at.Proto, netip.AddrPortFrom(at.Addr.Addr(), 0)}]
	return ok
}

// attach hands the set to the filter by apply, now and whenever it changes.
func (e *endpoints) attach(apply func([]endpoint) error) {
	e.applying.Lock()
	e.apply, e.applied = apply, 0
	e.applying.Unlock()
	e.mu.Lock()
	e.gen++
	e.mu.Unlock()
	e.push()
}

// push brings the filter up to date. It returns when it is.
func (e *endpoints) push() {
	e.mu.Lock()
	gen := e.gen
	e.mu.Unlock()
	e.applying.Lock()
	defer e.applying.Unlock()
	if e.apply == nil || e.applied >= gen {
		return
	}
	e.mu.Lock()
	gen = e.gen
	all := slices.Collect(maps.Keys(e.known))
	e.mu.Unlock()
	if err := e.apply(all); err != nil {
		e.log.Error("the filter does not know where the proxy is: it may be cut off", "err", err)
		return
	}
	e.applied = gen
}

// list is the set, sorted.
func (e *endpoints) list() []endpoint {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.SortedFunc(maps.Keys(e.known), func(a, b endpoint) int {
		if a.Proto != b.Proto {
			return int(a.Proto) - int(b.Proto)
		}
		return a.Addr.Compare(b.Addr)
	})
}

// of lists those that belong to a server.
func (e *endpoints) of(owner string) (out []endpoint) {
	for _, at := range e.list() {
		e.mu.Lock()
		if e.known[at] == owner {
			out = append(out, at)
		}
		e.mu.Unlock()
	}
	return out
}

// resolver takes in a resolver that is about to be asked for a proxy's name.
func (e *endpoints) resolver(address string) {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return
	}
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	e.mu.Lock()
	e.add(resolvers, endpoint{flow.UDP, at})
	e.add(resolvers, endpoint{flow.TCP, at})
	e.mu.Unlock()
	e.push()
}

// resolved takes in what a proxy's name stands for. What it stood for before stays: connections may live there.
func (e *endpoints) resolved(host string, addrs []netip.Addr) {
	e.mu.Lock()
	for _, s := range e.servers {
		if s.Host() != host {
			continue
		}
		for _, a := range addrs {
			e.add(s.String(), endpoint{flow.TCP, netip.AddrPortFrom(a.Unmap(), s.Port())})
		}
	}
	e.mu.Unlock()
	e.push()
}

// relay takes in a relay of a server and then calls then: at once if it is known, else later, on another goroutine,
// which lives for as long as the filter takes.
func (e *endpoints) relay(server string, at netip.AddrPort, then func()) {
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	e.mu.Lock()
	if e.has(endpoint{flow.UDP, at}) {
		e.mu.Unlock()
		then()
		return
	}
	ports := e.ports[at.Addr()] + 1
	if ports > relayMany {
		at = netip.AddrPortFrom(at.Addr(), 0)
		maps.DeleteFunc(e.known, func(k endpoint, _ string) bool {
			return k.Proto == flow.UDP && k.Addr.Addr() == at.Addr() && k.Addr.Port() != 53
		})
	}
	if e.add(server, endpoint{flow.UDP, at}) {
		e.ports[at.Addr()] = ports
	} else { // nor is its address remembered: a proxy may name as many as it likes
		e.log.Warn("too many relays: the filter does not let this one pass", "relay", at, "limit", maxEndpoints)
	}
	e.mu.Unlock()
	go func() {
		e.push()
		then()
	}()
}
