package route

import (
	"net/netip"
	"strings"

	"github.com/viasocks/viasocks/stack/flow"
)

// query is what a verdict is based on. What is unknown is zero.
type query struct {
	proto    flow.Proto
	src, dst netip.AddrPort // unmapped
	names    []string       // plain names that dst may stand for
	fake     bool           // dst is a fake address, and the name that it stands for is carried
	owner    *flow.Owner    // nil: it was not looked up
}

// answer tells whether a rule matches.
type answer uint8

const (
	no answer = iota
	yes
	ask // everything except the owner matches, and the owner was not looked up
)

// matches reports whether all conditions hold. It does not allocate.
func (r *Rule) matches(q *query) answer {
	if r.proto != 0 && (r.proto == q.proto) == r.turned(ofProto) {
		return no
	}
	if r.ports != nil && hasPort(r.ports, q.dst.Port()) == r.turned(ofPort) {
		return no
	}
	if r.prefixes != nil && contain(r.prefixes, q.dst.Addr()) == r.turned(ofDest) {
		return no
	}
	if r.rest == nil {
		return yes
	}
	return r.restMatches(q)
}

// turned reports whether the condition of kind k is preceded by "not".
func (r *Rule) turned(k kinds) bool { return r.not&k != 0 }

func (r *Rule) restMatches(q *query) answer {
	m := r.rest
	if m.kinds&ofSource != 0 && contain(m.src, q.src.Addr()) == r.turned(ofSource) {
		return no
	}
	if m.kinds&ofName != 0 && anyName(m.names, q.names) == r.turned(ofName) {
		return no
	}
	if m.kinds&ofList != 0 && m.list.has(q) == r.turned(ofList) {
		return no
	}
	if m.kinds&ofOwner == 0 {
		return yes
	}
	if q.owner == nil {
		return ask
	}
	return r.ownerMatches(q.owner)
}

func (r *Rule) ownerMatches(o *flow.Owner) answer {
	m := r.rest
	if m.kinds&ofUser != 0 && (o.Known && hasUser(m.users, o.UID)) == r.turned(ofUser) {
		return no
	}
	if m.kinds&ofCgroup != 0 && inGroup(m.groups, o.Cgroup) == r.turned(ofCgroup) {
		return no
	}
	if m.kinds&ofExe != 0 && isProgram(m.exes, o.Exe) == r.turned(ofExe) {
		return no
	}
	return yes
}

func hasPort(ranges []portRange, port uint16) bool {
	for _, p := range ranges {
		if port >= p.lo && port <= p.hi {
			return true
		}
	}
	return false
}

func contain(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func anyName(patterns []namePattern, names []string) bool {
	for _, name := range names {
		for _, p := range patterns {
			if p.matches(name) {
				return true
			}
		}
	}
	return false
}

func hasUser(users []userRange, uid uint32) bool {
	for _, u := range users {
		if uid >= u.first && uid <= u.last {
			return true
		}
	}
	return false
}

// inGroup reports whether a control group is one of groups, or below one.
func inGroup(groups []string, cgroup string) bool {
	for _, g := range groups {
		if rest, ok := strings.CutPrefix(cgroup, g); ok && (rest == "" || rest[0] == '/') {
			return true
		}
	}
	return false
}

func isProgram(patterns []string, exe string) bool {
	if exe == "" {
		return false
	}
	for _, p := range patterns {
		if glob(p, exe) {
			return true
		}
	}
	return false
}
