package route

import (
	"crypto/x509"
	"errors"
	"slices"

	"github.com/viasocks/viasocks/route/dns"
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
	asks := resolverSet{p.Resolvers, p.ResolverCAs, p.RelayDNS}
	server, err := r.port53.next(next, old, &asks)
	if err != nil {
		return err
	}
	if r.ctx.Err() != nil || !r.ran.Load() {
		return errNotRunning
	}
	r.usePolicy(next)
	next.forgetLearned()
	r.watchUpstreams(next)
	r.port53.use(server, &asks)
	if !slices.Equal(next.order, old.order) {
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

var errNetwork = errors.New("the network has changed")

// Renew makes again what would wait long for an answer over a network that no longer exists: associations, and the
// connections to resolvers. It forgets what is known about the upstreams' IPv6. The mappings stay. It may be called
// from any goroutine and does not wait.
func (r *Router) Renew() {
	r.policy.Load().forgetLearned()
	for _, s := range r.shards {
		s.renew()
	}
	r.port53.renew()
}

// renew makes the open associations again.
func (r *shard) renew() {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	for _, m := range r.udp.all {
		for _, a := range m.assocs {
			if a.link != nil {
				r.inbox.post(event{kind: evClosed, t: a.try, err: errNetwork})
			}
		}
	}
}
