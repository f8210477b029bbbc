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
	servers []socks.Server // of the configuration
	known   map[endpoint]*known
	ports   map[netip.Addr]int // of relays at this address
	idle    []*known           // relays that no association uses, among others that are used again
	full    said               // that there is no room for a relay
	gen     uint64             // counts changes

	applying sync.Mutex
	apply    func([]endpoint) error // nil: there is no filter
	applied  uint64
}

// known is an endpoint of the set.
type known struct {
	at     endpoint
	owner  string    // a server, or resolvers
	uses   int       // associations of this relay
	since  time.Time // a relay: it has not been used
	listed bool      // in idle
	into   *known    // its address stands with any port instead
}

// said is a message that is not repeated for a while.
type said struct {
	at   time.Time
	more int
}

// A relay that no association uses is forgotten after relayIdle: another association may be given the same one. A warning
// is not repeated within warnEvery.
const (
	relayIdle = time.Minute
	warnEvery = time.Minute
)

// A proxy that gives each association a port of its own has thousands: from relayMany on the relay's address stands with
// any port. maxEndpoints bounds what a resolver or a proxy can make us hold.
const (
	relayMany    = 256
	maxEndpoints = 4096
	resolvers    = "resolvers" // no server's name: those have a scheme
)

func newEndpoints(log *slog.Logger) *endpoints {
	return &endpoints{log: log, known: map[endpoint]*known{}, ports: map[netip.Addr]int{}}
}

// configure says which proxies there are. Those given by address are in the set from here on; what belongs to others is
// taken out.
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

// add takes one in; e.mu is held. nil: there is no room.
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

// find: e.mu is held.
func (e *endpoints) find(at endpoint) *known {
	if k := e.known[at]; k != nil {
		return k
	}
	return e.known[endpoint{at.Proto, netip.AddrPortFrom(at.Addr.Addr(), 0)}]
}

// forget takes out the relays that have been idle for so long; e.mu is held.
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
		e.log.Error("cannot tell the filter the proxy's address: the proxy may be cut off", "err", err)
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
		if k := e.known[at]; k != nil && k.owner == owner {
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
// which lives for as long as the filter takes. over is to be called once, when the association is over.
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

// addRelay takes in a relay that is not known; e.mu is held. nil: there is no room. Its address is then not remembered
// either: a proxy may name as many as it likes.
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

// warnFull says that there is no room for a relay, once in a while; e.mu is held.
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
