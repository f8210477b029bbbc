package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// policy is the compiled configuration. It never changes, except for the counters.
type policy struct {
	needs     kinds // kinds of conditions in all rules
	guard     bool  // Config.Guard
	tor       bool  // an upstream is a Tor
	split     Split
	fake      bool // Config.Fake is set, and there is a pool
	rules     []Rule
	verdicts  []*verdict // one for each rule
	nameless  []*Rule    // the same rules, see withoutNames; nil: no rule uses a name
	otherwise *verdict
	resolvers *verdict // for connections to resolvers that no rule matches
	upstreams map[string]*upstream
	order     []*upstream
}

// noRule is the name of the rule if none has decided.
const noRule = "none"

// newPolicy checks and compiles cfg. Upstreams that are also in old (which may be nil) keep what is known about them.
func newPolicy(cfg Config, old *policy) (*policy, error) {
	p := &policy{
		rules: cfg.Rules, guard: cfg.Guard, fake: cfg.Fake && cfg.Pool != nil, split: cfg.Split,
		upstreams: make(map[string]*upstream),
	}
	have, err := p.addUpstreams(cfg.Upstreams, old)
	if err != nil {
		return nil, err
	}
	shards := max(cfg.Shards, 1)
	for i := range p.rules {
		if err := p.addRule(i, shards, have); err != nil {
			return nil, err
		}
	}
	p.otherwise = &verdict{kind: reject, rule: noRule, hits: make(hits, shards)}
	if cfg.Default != "" {
		up := p.upstreams[cfg.Default]
		if up == nil {
			return nil, fmt.Errorf("cannot use default %q: no upstream has this name, %s", cfg.Default, have)
		}
		p.otherwise = &verdict{up: up, rule: "default", hits: make(hits, shards)}
	}
	p.resolvers = p.otherwise
	if name := cfg.ResolverDefault; name != "" && name != cfg.Default {
		up := p.upstreams[name]
		if up == nil {
			return nil, fmt.Errorf("cannot ask resolvers by %q: no upstream has this name, %s", name, have)
		}
		p.resolvers = &verdict{up: up, rule: "dns"}
	}
	return p, nil
}

// addUpstreams adds the upstreams. have names them all for error messages.
func (p *policy) addUpstreams(all []Upstream, old *policy) (have string, err error) {
	var names []string
	for _, u := range all {
		name := u.Name()
		if err := CheckName(name); err != nil {
			return "", fmt.Errorf("cannot use an upstream: %w", err)
		}
		if p.upstreams[name] != nil {
			return "", fmt.Errorf("cannot use two upstreams of one name: %s", name)
		}
		up := &upstream{Upstream: u, name: name}
		if b, ok := u.(interface{ ByProgram() bool }); ok {
			up.apart = b.ByProgram()
		}
		if t, ok := u.(interface{ Tor() bool }); ok && t.Tor() {
			p.tor = true
		}
		up.count = new(upstreamCounters)
		if old != nil && old.upstreams[name] != nil {
			up.count = old.upstreams[name].count // also where the servers are others now
			if old.upstreams[name].Upstream == u {
				up = old.upstreams[name]
			}
		}
		p.upstreams[name] = up
		p.order = append(p.order, up)
		names = append(names, name)
	}
	if len(names) == 0 {
		return "there are no upstreams", nil
	}
	return "the upstreams are " + strings.Join(names, ", "), nil
}

// addRule adds the verdict of the rule with index i.
func (p *policy) addRule(i, shards int, have string) error {
	rule := &p.rules[i]
	v := &verdict{rule: rule.String(), hits: make(hits, shards)}
	switch {
	case rule.text == "":
		return errors.New("cannot use an empty rule")
	case rule.action == ActionReject:
		v.kind = reject
	case rule.action == ActionDrop:
		v.kind = drop
	default:
		if v.up = p.upstreams[rule.via]; v.up == nil {
			return fmt.Errorf("cannot use rule %q: no upstream is named %q, %s", rule, rule.via, have)
		}
	}
	if rule.rest != nil {
		p.needs |= rule.rest.kinds
	}
	if one := rule.withoutNames(); one != nil {
		if p.nameless == nil {
			p.nameless = make([]*Rule, len(p.rules))
		}
		p.nameless[i] = one
	}
	p.verdicts = append(p.verdicts, v)
	return nil
}

// decideResolver returns the verdict on a connection to a resolver. The connection is ours, so it has no owner that a
// rule could mean.
func (p *policy) decideResolver(r dns.Resolver) *verdict {
	q := query{proto: flow.TCP, dst: r.Addr, owner: &nobody}
	if r.Name != "" {
		q.names, q.fake = []string{r.Name}, !r.Addr.Addr().IsValid()
	}
	return p.decideQuestion(&q)
}

// decideRelayed returns the verdict on a question by UDP to the server that the app asked.
func (p *policy) decideRelayed(dst netip.AddrPort) *verdict {
	return p.decideQuestion(&query{proto: flow.UDP, dst: dst, owner: &nobody})
}

func (p *policy) decideQuestion(q *query) *verdict {
	if v := p.decide(q); v != p.otherwise {
		return v
	}
	return p.resolvers
}

var nobody flow.Owner

// plain reports whether verdicts depend only on protocol and destination.
func (p *policy) plain() bool { return p.needs == 0 }

// decide returns the verdict of the first rule that matches, or verdictAsk if that depends on an owner that was not
// looked up. It does not allocate.
func (p *policy) decide(q *query) *verdict {
	for i := range p.rules {
		switch p.rules[i].matches(q) {
		case yes:
			return p.verdicts[i]
		case ask:
			return verdictAsk
		}
	}
	return p.otherwise
}

func (p *policy) has(u *upstream) bool { return u.own || slices.Contains(p.order, u) }
