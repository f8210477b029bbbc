package route

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/stack/flow"
)

// Question is a flow for which the user wants to know the verdict. What the user does not give is unknown.
type Question struct {
	q                query
	uid, exe, cgroup bool // were given
}

// ParseQuestion parses PROTO:HOST:PORT, optionally followed, with spaces between, by addr=ADDRESS (of a name),
// src=ADDRESS, user=USER, exe=PATH and cgroup=PATH. An IPv6 address is written in brackets.
func ParseQuestion(s string) (Question, error) {
	var x Question
	words := strings.Fields(s)
	if len(words) == 0 || len(s) > maxRuleText {
		return x, errors.New("write a flow such as tcp:example.com:443")
	}
	if err := x.destination(words[0]); err != nil {
		return x, err
	}
	owner := flow.Owner{}
	for _, w := range words[1:] {
		key, v, _ := strings.Cut(w, "=")
		if v == "" {
			return x, fmt.Errorf("%q: write addr=ADDRESS, src=ADDRESS, user=USER, exe=PATH or cgroup=PATH", clip(w))
		}
		var err error
		switch key {
		case "addr", "src":
			var a netip.Addr
			if a, err = netip.ParseAddr(v); err == nil && key == "addr" {
				x.q.dst = netip.AddrPortFrom(a.Unmap(), x.q.dst.Port())
			} else if err == nil {
				x.q.src = netip.AddrPortFrom(a.Unmap(), 0)
			} else {
				err = fmt.Errorf("%q is not an address", clip(v))
			}
		case "user":
			var u userRange
			if u, err = parseUser(v); err == nil && u.first != u.last {
				err = errors.New("write one user")
			}
			owner.UID, owner.Known, x.uid = u.first, true, true
		case "exe":
			owner.Exe, x.exe = v, true
		case "cgroup":
			owner.Cgroup, err = parseGroup(v)
			x.cgroup = true
		default:
			err = fmt.Errorf("unknown word %q: write addr=, src=, user=, exe= or cgroup=", clip(key))
		}
		if err != nil {
			return x, err
		}
	}
	x.q.owner = &owner
	return x, nil
}

func (x *Question) destination(s string) error {
	bad := fmt.Errorf("%q: write it as tcp:example.com:443, udp:192.0.2.1:53 or tcp:[2001:db8::1]:443", clip(s))
	proto, rest, ok := strings.Cut(s, ":")
	colon := strings.LastIndexByte(rest, ':')
	if !ok || colon < 0 {
		return bad
	}
	var err error
	if x.q.proto, err = parseProto(proto); err != nil {
		return err
	}
	port, err := strconv.ParseUint(rest[colon+1:], 10, 16)
	if err != nil || port == 0 {
		return bad
	}
	host := rest[:colon]
	inside, bracketed := strings.CutPrefix(strings.TrimSuffix(host, "]"), "[")
	if a, err := netip.ParseAddr(inside); err == nil && a.Zone() == "" && bracketed == a.Is6() {
		x.q.dst = netip.AddrPortFrom(a.Unmap(), uint16(port))
		return nil
	}
	name := plainName(host)
	if checkDomain(name, false) != nil || isNumbers(name) {
		return bad
	}
	x.q.dst = netip.AddrPortFrom(netip.Addr{}, uint16(port))
	x.q.names = []string{name}
	return nil
}

// Step is the result of one rule for a flow.
type Step struct {
	Decides bool
	Unknown bool // it is unknown whether the rule matches
	Why     string
}

// Explain tells for each rule, up to the one that decides, whether and why it matches. decides is the index of that
// rule, or -1 if none does. early is set if the flow is handled before any rule is evaluated, and describes how.
func Explain(rules []Rule, x Question) (steps []Step, decides int, early string) {
	dst := x.q.dst
	if a := dst.Addr(); a.IsValid() && (!flow.OneHost(a) || flow.IsOurs(a)) {
		early = "nothing can be carried to this address: it is refused"
	} else if dst.Port() == 53 {
		early = "port 53 is answered by viasocks itself"
	}
	if early != "" {
		return nil, -1, early
	}
	for i := range rules {
		step := x.step(&rules[i])
		steps = append(steps, step)
		if step.Decides {
			return steps, i, ""
		}
	}
	return steps, -1, ""
}

// step checks each condition of a rule separately. A condition that does not hold is final; one that is unknown is
// not.
func (x *Question) step(r *Rule) Step {
	var open, holds []string
	for k := ofProto; k <= ofExe; k <<= 1 {
		if len(r.values(k)) == 0 {
			continue
		}
		one := r.only(k)
		text := strings.TrimSuffix(one.format(), " drop")
		if missing := x.missing(k, &one); missing != "" {
			open = append(open, fmt.Sprintf("%q cannot be decided: add %s", text, missing))
		} else if one.matches(&x.q) != yes {
			return Step{Why: fmt.Sprintf("%q does not hold", clip(text))}
		} else {
			holds = append(holds, strconv.Quote(clip(text)))
		}
	}
	switch {
	case len(open) > 0:
		return Step{Unknown: true, Why: strings.Join(open, "; ")}
	case len(holds) == 0:
		return Step{Decides: true, Why: "it has no condition"}
	}
	return Step{
		Decides: true,
		Why:     strings.Join(holds, " and ") + map[bool]string{true: " holds", false: " hold"}[len(holds) == 1],
	}
}

// only returns r with one of its conditions, and with the verdict drop.
func (r *Rule) only(k kinds) Rule {
	one := Rule{not: r.not & k, action: ActionDrop}
	switch k {
	case ofProto:
		one.proto = r.proto
	case ofDest:
		one.prefixes = r.prefixes
	case ofPort:
		one.ports = r.ports
	default:
		m := &rest{kinds: k}
		switch k {
		case ofSource:
			m.src = r.rest.src
		case ofName:
			m.names = r.rest.names
		case ofList:
			m.list = r.rest.list
		case ofUser:
			m.users = r.rest.users
		case ofCgroup:
			m.groups = r.rest.groups
		case ofExe:
			m.exes = r.rest.exes
		}
		one.rest = m
	}
	return one
}

// missing returns what the question does not give and the condition of kind k needs; "": nothing.
func (x *Question) missing(k kinds, one *Rule) string {
	switch {
	case k == ofDest && !x.q.dst.Addr().IsValid():
		return "addr=ADDRESS"
	case k == ofList && !x.q.dst.Addr().IsValid() && !one.rest.list.has(&x.q) && len(one.rest.list.v4)+len(one.rest.list.v6) > 0:
		return "addr=ADDRESS"
	case k == ofSource && !x.q.src.IsValid():
		return "src=ADDRESS"
	case k == ofUser && !x.uid:
		return "user=USER"
	case k == ofCgroup && !x.cgroup:
		return "cgroup=PATH"
	case k == ofExe && !x.exe:
		return "exe=PATH"
	}
	return ""
}
