package daemon

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

// endpoint is a destination for our sockets. Port 0 means any port.
type endpoint struct {
	Proto flow.Proto
	Addr  netip.AddrPort
}

// endpoints is the set of allowed endpoints: the addresses of the proxies, the relays that they named, and the
// resolvers for the proxies' names. The filter contains the same set, so that a program cannot leave by setting our
// mark on a packet. A new endpoint is in the filter before the first packet is sent to it. The methods may be called
// from any goroutine.
type endpoints struct {
	log *slog.Logger

	mu      sync.Mutex
	servers []socks.Server // of the configuration
	known   map[endpoint]*known
	ports   map[netip.Addr]int // number of relays at this address
	idle    []*known           // relays without an association, and others that are in use again
	full    said               // the warning that there is no room for a relay
	others  []endpoint         // those of another viasocks, which this one has taken over from
	gen     uint64             // counts changes

	applying sync.Mutex
	apply    func([]endpoint) error // nil: there is no filter
	applied  uint64
}

// known is an endpoint in the set.
type known struct {
	at     endpoint
	owner  string    // a server, or resolvers
	uses   int       // associations that use this relay
	since  time.Time // for a relay: since when it is unused
	listed bool      // in idle
	into   *known    // the entry for any port of its address, which replaces it
}

// said is a message that is not repeated for a while.
type said struct {
	at   time.Time
	more int
}

// A relay without an association is forgotten after relayIdle, because another association may be given the same one.
// A warning is not repeated within warnEvery.
const (
	relayIdle = time.Minute
	warnEvery = time.Minute
)

// A proxy that gives each association its own port has thousands of relays. From relayMany on, the relay's address is
// allowed with any port. maxEndpoints limits what a resolver or a proxy can make us store.
const (
	relayMany    = 256
	maxEndpoints = 4096
	resolvers    = "resolvers" // no server has this name, because servers have a scheme
)

func newEndpoints(log *slog.Logger) *endpoints {
	return &endpoints{log: log, known: map[endpoint]*known{}, ports: map[netip.Addr]int{}}
}

// configure sets the proxies. Those given by address are in the set from now on; endpoints of other owners are
// removed.
func (e *endpoints) configure(ups []config.Upstream) {
	e.mu.Lock()
	e.servers = nil
	owners := map[string]bool{resolvers: true}
	for _, u := range ups {
		for _, s := range u.Reached() {
			owners[s.String()] = true
			e.servers = append(e.servers, s)
		}
	}
	for at, k := range e.known {
		if !owners[k.owner] {
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

// add adds an endpoint and returns it, or nil if there is no room. The caller holds e.mu.
func (e *endpoints) add(owner string, at endpoint) *known {
	if k := e.known[at]; k != nil {
		return k
	}
	if len(e.known) >= maxEndpoints {
		return nil
	}
	k := &known{at: at, owner: owner}
	e.known[at] = k
	e.gen++
	return k
}

// find returns the entry for an endpoint. The caller holds e.mu.
func (e *endpoints) find(at endpoint) *known {
	if k := e.known[at]; k != nil {
		return k
	}
	return e.known[endpoint{at.Proto, netip.AddrPortFrom(at.Addr.Addr(), 0)}]
}

// forget removes the relays that have been idle for the given time. The caller holds e.mu.
func (e *endpoints) forget(idle time.Duration) {
	now := time.Now()
	all := e.idle
	e.idle = nil
	for _, k := range all {
		switch {
		case k.uses > 0 || e.known[k.at] != k:
			k.listed = false
		case now.Sub(k.since) < idle:
			e.idle = append(e.idle, k)
		default:
			delete(e.known, k.at)
			e.gen++
			a := k.at.Addr.Addr()
			if e.ports[a]--; e.ports[a] <= 0 || k.at.Addr.Port() == 0 {
				delete(e.ports, a)
			}
		}
	}
}

// released is called when an association of a relay is over.
func (e *endpoints) released(k *known) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for k.into != nil {
		k = k.into
	}
	if k.uses--; k.uses == 0 && e.known[k.at] == k {
		k.since = time.Now()
		if !k.listed {
			k.listed = true
			e.idle = append(e.idle, k)
		}
	}
}

// attach passes the set to the filter by apply, now and after each change.
func (e *endpoints) attach(apply func([]endpoint) error) {
	e.applying.Lock()
	e.apply, e.applied = apply, 0
	e.applying.Unlock()
	e.mu.Lock()
	e.gen++
	e.mu.Unlock()
	e.push()
}

// push updates the filter. When it returns, the filter is up to date.
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
	all := append(slices.Collect(maps.Keys(e.known)), e.others...)
	e.mu.Unlock()
	if err := e.apply(all); err != nil {
		e.log.Error("cannot add the proxy's address to the filter: the proxy may be cut off", "err", err)
		return
	}
	e.applied = gen
}

// also sets which endpoints another viasocks uses.
func (e *endpoints) also(others []endpoint) {
	e.mu.Lock()
	e.others = others
	e.gen++
	e.mu.Unlock()
	e.push()
}

// everything returns the set with the endpoints of another viasocks.
func (e *endpoints) everything() []endpoint {
	all := e.list()
	e.mu.Lock()
	defer e.mu.Unlock()
	return append(all, e.others...)
}

// list returns the set, sorted, without those of another viasocks.
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

// of returns the endpoints that belong to a server.
func (e *endpoints) of(owner string) (out []endpoint) {
	for _, at := range e.list() {
		e.mu.Lock()
		if k := e.known[at]; k != nil && k.owner == owner {
			out = append(out, at)
		}
		e.mu.Unlock()
	}
	return out
}

// resolver adds a resolver that is about to be asked for a proxy's name.
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

// resolved adds the addresses of a proxy's name. Earlier addresses stay, because connections may use them.
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

// relay adds a relay of a server and then calls then: at once if the relay is known, otherwise later on another
// goroutine, which lives as long as the filter takes. The caller must call over once, when the association is over.
func (e *endpoints) relay(server string, at netip.AddrPort, then func()) (over func()) {
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	e.mu.Lock()
	if k := e.find(endpoint{flow.UDP, at}); k != nil {
		k.uses++
		e.mu.Unlock()
		then()
		return func() { e.released(k) }
	}
	e.forget(relayIdle)
	if len(e.known) >= maxEndpoints {
		e.forget(0)
	}
	k := e.addRelay(server, at)
	if k != nil {
		k.uses++
	} else {
		e.warnFull(at)
	}
	e.mu.Unlock()
	go func() {
		e.push()
		then()
	}()
	return func() {
		if k != nil {
			e.released(k)
		}
	}
}

// addRelay adds an unknown relay and returns it, or nil if there is no room. In that case its address is not stored
// either, because a proxy may name any number. The caller holds e.mu.
func (e *endpoints) addRelay(server string, at netip.AddrPort) *known {
	ports := e.ports[at.Addr()] + 1
	if ports <= relayMany {
		k := e.add(server, endpoint{flow.UDP, at})
		if k != nil {
			e.ports[at.Addr()] = ports
		}
		return k
	}
	any := &known{at: endpoint{flow.UDP, netip.AddrPortFrom(at.Addr(), 0)}, owner: server}
	maps.DeleteFunc(e.known, func(a endpoint, k *known) bool {
		if a.Proto != flow.UDP || a.Addr.Addr() != at.Addr() || k.owner == resolvers {
			return false
		}
		k.into = any
		any.uses += k.uses
		return true
	})
	e.known[any.at] = any
	e.ports[at.Addr()] = ports
	e.gen++
	return any
}

// warnFull logs, at a limited rate, that there is no room for a relay. The caller holds e.mu.
func (e *endpoints) warnFull(relay netip.AddrPort) {
	now := time.Now()
	if !e.full.at.IsZero() && now.Sub(e.full.at) < warnEvery {
		e.full.more++
		return
	}
	e.log.Warn("too many relay addresses are in use: the filter refuses this one",
		"relay", relay, "limit", maxEndpoints, "unsaid", e.full.more)
	e.full = said{at: now}
}
