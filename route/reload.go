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
	Upstreams []Upstream // an upstream that was there before, as the same value, continues with its flows
	Rules     []Rule
	Default   string
	Resolvers []dns.Resolver // must not be empty, unless there were none before
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

// Reload replaces the policy, or changes nothing and returns an error. New flows and the next datagram of each
// mapping follow the new rules. Connections through an upstream that was removed are reset, its associations end, and
// their mappings get others with the next datagram. It may be called from any goroutine, but not concurrently. It
// does not wait for what ends.
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
		// Its connections belong to the old upstreams, and it cannot be given others.
		if names, err = r.newDNS(next, p.Resolvers, p.ResolverCAs, p.RelayDNS, &p.Split); err != nil {
			return err
		}
	}
	if r.ctx.Err() != nil || !r.ran.Load() {
		return errNotRunning
	}
	r.usePolicy(next)
	next.forgetLearned()
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

// usePolicy puts p in force, empties the caches and ends the associations of upstreams that p does not have. All
// datagrams of a burst must be judged by one policy and its own cache, so all shards wait meanwhile.
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

// usePolicy empties the cache and ends the associations of upstreams that p does not have. The caller holds udp.mu.
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

// endReplaced ends the TCP flows of upstreams that p does not have.
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
	cfg := dns.Config{Dial: r.dialResolver, Resolvers: resolvers, RootCAs: roots, Relay: relay, Tor: r.askTor, Log: logTo(r.log),
		Own: r.host.ownName()}
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

// startDNS runs s instead of the previous server. The caller holds r.reload.
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

// startFirstDNS runs the dns.Server that New made, unless a Reload or Renew just after the start of Run has already
// started another one.
func (r *Router) startFirstDNS() {
	r.reload.Lock()
	defer r.reload.Unlock()
	if r.dnsStop == nil {
		r.startDNS(r.dns.Load())
	}
}

// dnsStats returns the counters of the running server and of those before it.
func (r *Router) dnsStats() (st dns.Stats) {
	r.reload.Lock()
	defer r.reload.Unlock()
	if d := r.dns.Load(); d != nil {
		st = d.Stats() // earlier servers no longer hold cached answers
	}
	count.Add(&st.Counters, &r.dnsPast)
	return st
}

var errNetwork = errors.New("the network has changed")

// Renew makes again what would wait long for an answer over a network that no longer exists: associations, and the
// connections to resolvers. It forgets what is known about the upstreams' IPv6. The mappings stay. It may be called
// from any goroutine and does not wait.
func (r *Router) Renew() {
	r.policy.Load().forgetLearned()
	for _, s := range r.shards {
		s.renew()
	}
	r.reload.Lock()
	defer r.reload.Unlock()
	if r.ctx.Err() != nil || !r.ran.Load() || r.dns.Load() == nil {
		return
	}
	p := r.policy.Load()
	if d, err := r.newDNS(p, r.resolvers, r.resolverCAs, r.relayDNS, &p.split); err == nil { // they were valid before
		r.startDNS(d)
	}
}

// renew makes the open associations again.
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

// SetUDP changes UDPTimeout and Limits.Mappings. As in Config, zero means the default. Mappings over a lower limit
// end when new ones come. New also uses it.
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
