package route

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/count"
)

// Policy is the part of a Config that can change while the Router runs.
type Policy struct {
	Upstreams []Upstream // one that was there before, the same value, goes on with its flows
	Rules     []Rule
	Default   string
	Resolvers []dns.Resolver // none only if there were none before
	// RelayDNS and ResolverCAs are as in Config.
	RelayDNS    bool
	ResolverCAs *x509.CertPool
	// ResolverDefault is as in Config.
	ResolverDefault string
	// Guard and Fake are as in Config.
	Guard, Fake bool
	// Split is as in Config.
	Split Split
}

var (
	errReplaced   = errors.New("its upstream is no longer configured")
	errNotRunning = errors.New("cannot change the rules of a router that does not run")
)

// Reload replaces the policy, or leaves everything as it is and returns an error. New flows and the next datagram of each
// mapping follow the new rules. Connections through an upstream that is gone are reset, its associations end, and their
// mappings get others with the next datagram. Any goroutine, one at a time; it does not wait for what ends.
func (r *Router) Reload(p Policy) error {
	cfg := r.cfg
	cfg.Upstreams, cfg.Rules, cfg.Default, cfg.Resolvers = p.Upstreams, p.Rules, p.Default, p.Resolvers
	cfg.ResolverDefault, cfg.Guard, cfg.Fake, cfg.Split = p.ResolverDefault, p.Guard, p.Fake, p.Split
	r.reload.Lock()
	defer r.reload.Unlock()
	old := r.policy.Load()
	next, err := newPolicy(cfg, old)
	if err != nil {
		return err
	}
	same := slices.Equal(next.order, old.order)
	var names *dns.Server
	if d := r.dns.Load(); (d != nil) != (len(p.Resolvers) > 0) {
		return errors.New("cannot change whether port 53 is answered while running")
	} else if d != nil && !(same && slices.Equal(p.Resolvers, r.resolvers) && p.ResolverCAs.Equal(r.resolverCAs) &&
		p.RelayDNS == r.relayDNS && next.fake == old.fake && p.Split.sameServers(&old.split)) {
		// Its connections are of the old upstreams, and it has no way to be told of others.
		if names, err = r.newDNS(next, p.Resolvers, p.ResolverCAs, p.RelayDNS, &p.Split); err != nil {
			return err
		}
	}
	if r.ctx.Err() != nil || !r.ran.Load() {
		return errNotRunning
	}
	r.usePolicy(next)
	next.forgetIPv6()
	r.watchUpstreams(next)
	if names != nil {
		r.startDNS(names)
		r.resolvers, r.resolverCAs, r.relayDNS = p.Resolvers, p.ResolverCAs, p.RelayDNS
	} else if d := r.dns.Load(); d != nil {
		d.Forget() // the rules may lead to the resolvers by another way
	}
	if !same {
		r.endReplaced(next)
	}
	return nil
}

// usePolicy puts p in force, empties the caches and ends the associations of upstreams that p has not. All datagrams of a burst
// are decided on by one policy and the cache that belongs to it: so all shards wait meanwhile.
func (r *Router) usePolicy(p *policy) {
	for _, s := range r.shards {
		s.udp.mu.Lock()
		defer s.udp.mu.Unlock()
	}
	r.policy.Store(p)
	for _, s := range r.shards {
		s.usePolicy(p)
	}
}

// usePolicy empties the cache and ends the associations of upstreams that p has not. udp.mu is held.
func (r *shard) usePolicy(p *policy) {
	r.udp.deep = r.deepFor(p)
	clear(r.udp.cache[:])
	for _, m := range r.udp.all {
		for _, a := range slices.Clone(m.assocs) {
			if !p.has(a.up) {
				m.drop(a)
				r.discard(a)
			}
		}
	}
}

// endReplaced ends the TCP flows of upstreams that p has not.
func (r *Router) endReplaced(p *policy) {
	for _, s := range r.snapshot() {
		if p.has(s.v.up) {
			continue
		}
		s.replaced.Store(true)
		s.endDial()
		if rel := s.relay.Load(); rel != nil {
			rel.Abort()
		}
	}
}

func (p *policy) has(u *upstream) bool { return u.own || slices.Contains(p.order, u) }

func (r *Router) newDNS(p *policy, resolvers []dns.Resolver, roots *x509.CertPool, relay bool,
	split *Split) (*dns.Server, error) {
	cfg := dns.Config{Dial: r.dialResolver, Resolvers: resolvers, RootCAs: roots, Relay: relay, Tor: r.askTor, Log: logTo(r.log)}
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

// startDNS runs s in place of the one before. r.reload is held.
func (r *Router) startDNS(s *dns.Server) {
	ctx, cancel := context.WithCancel(r.ctx)
	r.dnsRuns.Go(func() { _ = s.Run(ctx) })
	if old := r.dns.Swap(s); old != nil && old != s {
		past := old.Stats()
		count.Add(&r.dnsPast, &past.Counters)
	}
	if r.dnsStop != nil {
		r.dnsStop()
	}
	r.dnsStop = cancel
}

// startFirstDNS runs the dns.Server that New made, unless a Reload or Renew that came just after the start of Run has already
// started one in its place.
func (r *Router) startFirstDNS() {
	r.reload.Lock()
	defer r.reload.Unlock()
	if r.dnsStop == nil {
		r.startDNS(r.dns.Load())
	}
}

// dnsStats are the counters of the server that runs and of those before it.
func (r *Router) dnsStats() (st dns.Stats) {
	r.reload.Lock()
	defer r.reload.Unlock()
	if d := r.dns.Load(); d != nil {
		st = d.Stats() // those before it keep no answers any more
	}
	count.Add(&st.Counters, &r.dnsPast)
	return st
}

var errNetwork = errors.New("the network has changed")

// Renew makes anew what would wait long for an answer over a network that is not there any more: associations, and the
// connections to resolvers. It forgets what is known of the upstreams' IPv6. The mappings stay. Any goroutine; it does not wait.
func (r *Router) Renew() {
	r.policy.Load().forgetIPv6()
	for _, s := range r.shards {
		s.renew()
	}
	r.reload.Lock()
	defer r.reload.Unlock()
	if r.ctx.Err() != nil || !r.ran.Load() || r.dns.Load() == nil {
		return
	}
	p := r.policy.Load()
	if d, err := r.newDNS(p, r.resolvers, r.resolverCAs, r.relayDNS, &p.split); err == nil { // they were fine before
		r.startDNS(d)
	}
}

// renew has the associations that are open made anew.
func (r *shard) renew() {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	for _, m := range r.udp.all {
		for _, a := range m.assocs {
			if a.link != nil {
				r.ctl.post(event{kind: evClosed, t: a.try, err: errNetwork})
			}
		}
	}
}

// SetUDP changes UDPTimeout and Limits.Mappings. As in Config, zero means the default. Mappings that are too many now go when
// others come. New sets both by it, too.
func (r *Router) SetUDP(timeout time.Duration, mappings int) {
	if mappings == 0 {
		mappings = defaultMappings(openFiles())
	}
	for _, s := range r.shards {
		s.udp.mu.Lock()
		s.udp.live(timeout)
		s.udp.most = mappings
		s.udp.mu.Unlock()
	}
}
