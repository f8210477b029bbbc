package socks

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxAddrs limits how many addresses of a server's name are tried.
	maxAddrs = 16
	// lookAgain is the minimum time between two look-ups of the name of a server that is not reached, so that many
	// dials to a dead server do not flood the resolver.
	lookAgain = time.Second
)

// lookup is what a Client knows about its server's name. The last good answer is kept and used if a new look-up
// fails. The name is looked up again after a dial that reached none of the addresses.
type lookup struct {
	good atomic.Pointer[answer] // nil: none yet; written under mu

	mu      sync.Mutex
	asking  bool
	asked   time.Time // when the last look-up ended
	err     error     // its error
	waiting []*dial
}

// answer holds the addresses of a name; the one that last worked is the first. Only the field stale ever changes.
type answer struct {
	addrs []netip.AddrPort
	stale atomic.Bool
}

// LookupAddrs asks r for the addresses of host, which may itself be an address. It keeps the zone of a link-local
// address, as /etc/hosts and multicast DNS give it; net's LookupNetIP loses the zone (Go 1.26).
func LookupAddrs(ctx context.Context, r *net.Resolver, host string) ([]netip.Addr, error) {
	found, err := r.LookupIPAddr(ctx, host)
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.Addr, 0, len(found))
	for _, f := range found {
		if a, ok := netip.AddrFromSlice(f.IP); ok {
			addrs = append(addrs, a.Unmap().WithZone(f.Zone))
		}
	}
	return addrs, nil
}

// lookUp gives addresses to p and lets it connect, either now or when the resolver has answered. It is called on p's
// loop.
func (c *Client) lookUp(p *dial) {
	n := &c.names
	if a := n.good.Load(); a != nil && !a.stale.Load() && !sameAddrs(p.addrs, a.addrs) {
		p.try(a, p.addrs != nil)
		return
	}
	n.mu.Lock()
	a := n.good.Load()
	if a != nil && !n.asking && (!a.stale.Load() || time.Since(n.asked) < lookAgain) {
		n.mu.Unlock()
		if p.addrs != nil && sameAddrs(p.addrs, a.addrs) {
			p.fault(OpConnect, p.lastErr) // these were tried
			return
		}
		p.try(a, p.addrs != nil)
		return
	}
	if !n.asking && !c.ask() {
		n.mu.Unlock()
		p.finish(ErrClosed)
		return
	}
	n.asking = true
	p.state = resolving
	p.l.SetTimer(&p.Node, p.connectBy)
	n.waiting = append(n.waiting, p)
	n.mu.Unlock()
}

// try connects to the addresses of a look-up. With last, there will be no further look-up if none of them is reached.
func (p *dial) try(a *answer, last bool) {
	p.looked = last
	p.addrs, p.at = a.addrs, 0
	p.connect()
}

// ask looks up the name on its own goroutine. It returns false if the Dialer is closed.
func (c *Client) ask() bool {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if c.d.closed.Load() {
		return false
	}
	c.d.lookups.Go(func() {
		// Half of the time is left for the addresses of the last good answer.
		ctx, cancel := context.WithTimeout(c.d.ctx, c.connectTime()/2)
		defer cancel()
		ips, err := c.d.opts.Resolve(ctx, c.server.host)
		c.lookedUp(ips, err)
	})
	return true
}

var errNoAddrs = errors.New("the name has no addresses")

// lookedUp wakes the dials that wait for the look-up.
func (c *Client) lookedUp(ips []netip.Addr, err error) {
	n := &c.names
	var addrs []netip.AddrPort
	for _, ip := range ips {
		ap := netip.AddrPortFrom(ip.Unmap(), c.server.port)
		if ip.IsValid() && !ip.IsUnspecified() && len(addrs) < maxAddrs && !slices.Contains(addrs, ap) {
			addrs = append(addrs, ap)
		}
	}
	if err == nil && len(addrs) == 0 {
		err = errNoAddrs
	}
	n.mu.Lock()
	n.asking, n.asked, n.err = false, time.Now(), err
	if err == nil {
		n.good.Store(&answer{addrs: byTurns(addrs)})
	}
	known := n.good.Load() != nil
	waiting := n.waiting
	n.waiting = nil
	n.mu.Unlock()
	if err != nil {
		c.d.log.Debug("cannot look up a SOCKS server", "server", c.server, "err", err, "known", known)
	}
	for _, p := range waiting {
		p.l.Note(&p.Node, lookedUp)
	}
}

// resolved continues when the resolver has answered.
func (p *dial) resolved() {
	n := &p.c.names
	switch a := n.good.Load(); {
	case a == nil:
		n.mu.Lock()
		err := n.err
		n.mu.Unlock()
		p.fault(OpResolve, err)
	case p.addrs != nil && sameAddrs(p.addrs, a.addrs):
		p.fault(OpConnect, p.lastErr)
	default:
		p.try(a, true)
	}
}

// failed records that none of the addresses was reached.
func (c *Client) failed() {
	if a := c.names.good.Load(); a != nil {
		a.stale.Store(true)
	}
}

// reached records the address at which the server was reached, and puts it first.
func (c *Client) reached(at netip.AddrPort) {
	n := &c.names
	a := n.good.Load()
	if a == nil {
		return
	}
	if a.stale.Load() {
		a.stale.Store(false)
	}
	if a.addrs[0] == at {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a = n.good.Load()
	i := slices.Index(a.addrs, at)
	if i <= 0 {
		return
	}
	addrs := append(append([]netip.AddrPort{at}, a.addrs[:i]...), a.addrs[i+1:]...)
	n.good.Store(&answer{addrs: addrs})
}
