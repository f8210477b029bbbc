package route

import (
	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
)

// Straight is traffic that a rule lets out past every proxy, and that the kernel can recognize by itself.
type Straight struct {
	Proto  flow.Proto
	Net    netip.Prefix // of the destination; not valid: every destination
	Lo, Hi uint16       // ports of the destination
}

// StraightRules returns the rules with the verdict direct that the kernel can apply in place of the router, by their
// positions, and what they match, at most `most` entries. A rule qualifies if it depends on nothing but protocol, network and
// port, and if no rule before it may decide otherwise about the same traffic.
func StraightRules(rules []Rule, most int) (at []int, all []Straight) {
	for i := range rules {
		r := &rules[i]
		if !r.static() || shadowed(r, rules[:i]) {
			continue
		}
		if s := r.straight(); len(all)+len(s) <= most {
			at, all = append(at, i), append(all, s...)
		}
	}
	return at, all
}

func (r *Rule) goesDirect() bool { return r.action == ActionVia && r.via == DirectName }

// static reports whether the rule lets out what has certain destinations.
func (r *Rule) static() bool {
	return r.goesDirect() && r.rest == nil && r.not == 0 && (r.prefixes != nil || r.ports != nil)
}

// shadowed reports whether a rule of before may match the same traffic as r, and decide otherwise. Further conditions of
// that rule only make it match less.
func shadowed(r *Rule, before []Rule) bool {
	for i := range before {
		if b := &before[i]; !b.goesDirect() && !apart(r, b) {
			return true
		}
	}
	return false
}

// apart reports whether nothing can match both rules, as far as protocol, networks and ports tell. A condition with "not"
// tells nothing.
func apart(a, b *Rule) bool {
	if b.not&ofProto == 0 && a.proto != 0 && b.proto != 0 && a.proto != b.proto {
		return true
	}
	if b.not&ofPort == 0 && a.ports != nil && b.ports != nil && !portsMeet(a.ports, b.ports) {
		return true
	}
	return b.not&ofDest == 0 && a.prefixes != nil && b.prefixes != nil && !prefixesMeet(a.prefixes, b.prefixes)
}

func portsMeet(a, b []portRange) bool {
	for _, x := range a {
		for _, y := range b {
			if x.lo <= y.hi && y.lo <= x.hi {
				return true
			}
		}
	}
	return false
}

func prefixesMeet(a, b []netip.Prefix) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return true
			}
		}
	}
	return false
}

// straight returns what a static rule matches.
func (r *Rule) straight() (out []Straight) {
	protos := []flow.Proto{flow.TCP, flow.UDP}
	if r.proto != 0 {
		protos = []flow.Proto{r.proto}
	}
	ports := r.ports
	if ports == nil {
		ports = []portRange{{0, 65535}}
	}
	nets := r.prefixes
	if nets == nil {
		nets = []netip.Prefix{{}}
	}
	for _, proto := range protos {
		for _, n := range nets {
			for _, p := range ports {
				out = append(out, Straight{proto, n, p.lo, p.hi})
			}
		}
	}
	return out
}
