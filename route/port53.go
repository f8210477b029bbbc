package route

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/loop"
)

// port53 answers the questions to port 53: it owns the dns.Server, replaces it, and gives it its ways to the resolvers.
type port53 struct {
	*decider
	server  atomic.Pointer[dns.Server] // nil: port 53 is a port like others
	answer  *verdict                   // on TCP to port 53 whose questions are examined
	guarded guardLog

	// The fields below are guarded by decider.reload.
	asks resolverSet
	stop context.CancelFunc   // ends the running dns.Server
	past dns.Counters[uint64] // of earlier servers
	runs sync.WaitGroup
}

// resolverSet is whom a dns.Server asks, and how.
type resolverSet struct {
	resolvers []dns.Resolver
	roots     *x509.CertPool // nil: the system's authorities
	relay     bool           // Config.RelayDNS
}

func (s *resolverSet) equal(o *resolverSet) bool {
	return slices.Equal(s.resolvers, o.resolvers) && s.roots.Equal(o.roots) && s.relay == o.relay
}

// dialResolver dials for route/dns, by the rules like any flow, or by ResolverDefault if none matches.
func (r *port53) dialResolver(ctx context.Context, to dns.Resolver, done func(fd int, err error)) {
	v := r.policy.Load().decideResolver(to)
	if v.kind != carry {
		done(-1, fmt.Errorf("rule %q refuses it", v.rule))
		return
	}
	v.up.DialStream(ctx, r.cfg.Loops[0], resolverDest(to), func(s loop.Socket, err error) {
		if err != nil && isShortage(err) {
			r.short(err)
		}
		done(s.Release(), err)
	})
}

// askTor asks the upstream of resolvers, which must be a Tor, for route/dns.
func (r *port53) askTor(ctx context.Context, name string, ip netip.Addr, done func(netip.Addr, string, error)) {
	v := r.policy.Load().decideResolver(dns.Resolver{Kind: dns.Tor})
	if v.kind != carry {
		done(netip.Addr{}, "", fmt.Errorf("rule %q refuses it", v.rule))
		return
	}
	tor, ok := v.up.Upstream.(torUpstream)
	if !ok {
		done(netip.Addr{}, "", fmt.Errorf("the upstream %s is no Tor", v.up.name))
		return
	}
	tor.AskTor(ctx, r.cfg.Loops[0], name, ip, func(found netip.Addr, of string, err error) {
		var reply socks.Reply
		switch {
		case errors.Is(err, socks.ReplyHostUnreachable):
			err = dns.ErrNoName
		case errors.As(err, &reply):
			err = fmt.Errorf("%w: %w", dns.ErrNoAnswer, err)
		}
		done(found, of, err)
	})
}

// resolverDest returns the destination of a resolver, by name only if its address is unknown.
func resolverDest(to dns.Resolver) Dest {
	if to.Addr.Addr().IsValid() {
		return Dest{Addr: to.Addr}
	}
	return Dest{Addr: to.Addr, Name: to.Name}
}

// newServer returns a dns.Server for a policy.
func (r *port53) newServer(p *policy, asks *resolverSet, split *Split) (*dns.Server, error) {
	cfg := dns.Config{
		Dial: r.dialResolver, Resolvers: asks.resolvers, RootCAs: asks.roots, Relay: asks.relay, Tor: r.askTor, Log: logTo(r.log),
		Own: r.host.ownName(),
	}
	if p.fake {
		cfg.Fake = dns.FakeConfig{
			Pool:  r.cfg.Pool,
			IPv6:  r.givesIPv6,
			Onion: func() bool { return r.policy.Load().tor },
		}
	}
	r.split(&cfg, split)
	return dns.New(cfg)
}

// start runs s instead of the previous server. The caller holds reload.
func (r *port53) start(s *dns.Server) {
	ctx, cancel := context.WithCancel(r.ctx)
	r.runs.Go(func() { _ = s.Run(ctx) })
	if old := r.server.Swap(s); old != nil && old != s {
		past := old.Stats()
		count.Add(&r.past, &past.Counters)
	}
	if r.stop != nil {
		r.stop()
	}
	r.stop = cancel
}

// startFirst runs the dns.Server that New made, unless a Reload just after the start of Run has already started
// another one.
func (r *port53) startFirst() {
	r.reload.Lock()
	defer r.reload.Unlock()
	if r.stop == nil {
		r.start(r.server.Load())
	}
}

// stats returns the counters of the running server and of those before it.
func (r *port53) stats() (st dns.Stats) {
	r.reload.Lock()
	defer r.reload.Unlock()
	if d := r.server.Load(); d != nil {
		st = d.Stats() // earlier servers no longer hold cached answers
	}
	count.Add(&st.Counters, &r.past)
	return st
}

// split adds the names for other servers to the configuration of route/dns.
func (r *port53) split(cfg *dns.Config, s *Split) {
	cfg.Zones, cfg.HostServers, cfg.DialDirect = s.Zones, r.cfg.HostDNS.Servers, r.cfg.HostDNS.Dial
	if cfg.Fake.Pool == nil {
		return
	}
	cfg.Fake.NoSingleLabels = s.NoSingleLabels
	cfg.Fake.Real = func(name []byte) bool { return r.policy.Load().split.excludes(string(name)) }
	if cfg.HostServers != nil {
		cfg.HostNames = func(name []byte) bool {
			p := r.policy.Load()
			return p.mayBeDirect() && !p.split.excludes(string(name)) && p.sendsDirect(string(name))
		}
	}
}

// relays reports whether DNS questions go to the servers that the app asks.
func (r *port53) relays() bool {
	d := r.server.Load()
	return d != nil && d.Relays()
}

// init makes the first server, if port 53 is to be answered.
func (r *port53) init(p *policy) error {
	r.answer = newAnswers(r)
	if len(r.cfg.Resolvers) == 0 {
		return nil
	}
	r.asks = resolverSet{r.cfg.Resolvers, r.cfg.ResolverCAs, r.cfg.RelayDNS}
	d, err := r.newServer(p, &r.asks, &r.cfg.Split)
	if err != nil {
		return err
	}
	r.server.Store(d)
	return nil
}

// next returns the server that a new policy needs; nil: the running one, if there is one, stays. The caller holds reload.
func (r *port53) next(p, old *policy, asks *resolverSet) (*dns.Server, error) {
	d := r.server.Load()
	switch {
	case (d != nil) != (len(asks.resolvers) > 0):
		return nil, errors.New("cannot change whether port 53 is answered while running")
	case d == nil, slices.Equal(p.order, old.order) && asks.equal(&r.asks) && p.fake == old.fake &&
		p.split.sameServers(&old.split):
		return nil, nil
	}
	// The running server's connections belong to the old upstreams, and it cannot be given others.
	return r.newServer(p, asks, &p.split)
}

// use runs the server that next returned. The caller holds reload.
func (r *port53) use(s *dns.Server, asks *resolverSet) {
	if s != nil {
		r.start(s)
		r.asks = *asks
	} else if d := r.server.Load(); d != nil {
		d.Forget() // the rules may lead to the resolvers by another way
	}
}

// renew replaces the server, so that it opens its connections again.
func (r *port53) renew() {
	r.reload.Lock()
	defer r.reload.Unlock()
	if r.ctx.Err() != nil || r.stop == nil {
		return
	}
	p := r.policy.Load()
	if d, err := r.newServer(p, &r.asks, &p.split); err == nil { // it was valid before
		r.start(d)
	}
}

// wait waits for the servers to end. A Reload in progress may start one more; later ones see that it is over.
func (r *port53) wait() {
	r.reload.Lock()
	defer r.reload.Unlock()
	r.runs.Wait()
}
