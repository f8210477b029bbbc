package socks

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"
)

const (
	// maxAddrs bounds how many addresses of a server's name are tried.
	maxAddrs = 16
	// lookAgain is the least time between look-ups of a name whose server is not reached, so that a dead server with
	// many dials does not flood the resolver.
	lookAgain = time.Second
)

// lookup is what a Client knows about its server's name. The last good answer is kept: it is used when a new look-up
// fails. It is asked for anew after a dial that reached none of the addresses.
type lookup struct {
	addrs   []netip.AddrPort // the last good answer, the address that worked last first; never changed in place
	stale   bool
	asking  bool
	asked   time.Duration // when the last look-up ended
	waiting []*dial
}

// LookupAddrs asks r for the addresses of host, which may be an address itself. The zone of a link-local address stays, as
// /etc/hosts and multicast DNS have it; net's LookupNetIP loses it (Go 1.26).
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

// lookUp gives p addresses and lets it connect, now or when the resolver has answered.
func (c *Client) lookUp(p *dial) {
	n := &c.names
	fresh := !n.stale || c.d.now()-n.asked < lookAgain
	if len(n.addrs) > 0 && fresh && !n.asking {
		if p.addrs != nil && sameAddrs(p.addrs, n.addrs) {
			p.fault(OpConnect, p.lastErr) // these were tried
			return
		}
		p.looked = p.addrs != nil // a second list is the last one
		p.addrs, p.at = n.addrs, 0
		p.connect()
		return
	}
	p.state = resolving
	c.d.timers.set(p, p.connectBy)
	n.waiting = append(n.waiting, p)
	if n.asking {
		return
	}
	n.asking = true
	c.d.lookups.Go(func() {
		// Half of the time is left for the addresses of the last good answer.
		ctx, cancel := context.WithTimeout(c.d.ctx, c.connectTime()/2)
		defer cancel()
		ips, err := c.d.opts.Resolve(ctx, c.server.host)
		c.d.post(func() { c.lookedUp(ips, err) })
	})
}

var errNoAddrs = errors.New("the name has no addresses")

// lookedUp goes on with the dials that waited.
func (c *Client) lookedUp(ips []netip.Addr, err error) {
	n := &c.names
	n.asking, n.asked = false, c.d.now()
	var addrs []netip.AddrPort
	for _, ip := range ips {
		ap := netip.AddrPortFrom(ip.Unmap(), c.server.port)
		if ip.IsValid() && !ip.IsUnspecified() && len(addrs) < maxAddrs && !slices.Contains(addrs, ap) {
			addrs = append(addrs, ap)
		}
	}
	switch {
	case err == nil && len(addrs) > 0:
		n.addrs, n.stale = byTurns(addrs), false
	case err == nil:
		err = errNoAddrs
	}
	if err != nil {
		c.d.log.Debug("cannot look up a SOCKS server", "server", c.server, "err", err, "known", len(n.addrs))
	}
	waiting := n.waiting
	n.waiting = nil
	for _, p := range waiting {
		switch {
		case p.state != resolving: // its context or its time ended
		case len(n.addrs) == 0:
			p.fault(OpResolve, err)
		case p.addrs != nil && sameAddrs(p.addrs, n.addrs):
			p.fault(OpConnect, p.lastErr)
		default:
			p.looked = true
			p.addrs, p.at = n.addrs, 0
			p.connect()
		}
	}
}

// failed tells that none of the addresses was reached.
func (c *Client) failed() { c.names.stale = true }

// reached tells that the server was reached at this address, which is put first.
func (c *Client) reached(at netip.AddrPort) {
	n := &c.names
	n.stale = false
	i := slices.Index(n.addrs, at)
	if i <= 0 {
		return
	}
	addrs := append([]netip.AddrPort{at}, n.addrs[:i]...)
	n.addrs = append(addrs, n.addrs[i+1:]...)
}
