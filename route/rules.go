package route

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/stack/flow"
)

// Action is what a rule decides for a flow.
type Action uint8

const (
	ActionVia    Action = iota // carried by the upstream that the rule names
	ActionReject               // refused with an error that the app sees at once: RST, or ICMP port unreachable
	ActionDrop                 // no answer: the app's own timer decides
)

// DirectName is the name of the upstream that the verdict `direct` means.
const DirectName = "direct"

// Limits on the text of a rule: what is longer was not written by a person, and each is a bound on the work for a flow.
const (
	maxRuleText = 4096
	maxRuleList = 256 // prefixes, and port ranges, in one rule
	maxNameLen  = 64
)

// Rule is a line of policy. The rules of a Router are tried in order and the first that matches decides.
//
//	rule    = { "proto" ("tcp" | "udp") | "dst" cidr {"," cidr} | "port" ports {"," ports} } verdict
//	verdict = "via" NAME | "direct" | "reject" | "drop"
//	cidr    = an IPv4 or IPv6 network in CIDR form, or one address
//	ports   = N | N-M
//
// Conditions come in any order, each at most once, and all must hold; a rule without one matches every flow. NAME is
// an upstream's: a letter or digit, then letters, digits, '.', '_' and '-'. The zero Rule is not valid.
type Rule struct {
	proto    flow.Proto // 0: any
	prefixes []netip.Prefix
	ports    []portRange
	action   Action
	via      string // ActionVia: the upstream's name
	text     string // as String gives it
}

type portRange struct{ lo, hi uint16 }

// Action says what the rule decides.
func (r *Rule) Action() Action { return r.action }

// Via is the name of the upstream that the rule wants; empty unless the Action is ActionVia.
func (r *Rule) Via() string { return r.via }

// String is the rule in its shortest spelling, which ParseRule reads back to the same rule.
func (r *Rule) String() string { return r.text }

// ParseRule reads one rule. Its errors say which word is wrong and what to write in its place.
func ParseRule(s string) (Rule, error) {
	var r Rule
	if err := r.parse(s); err != nil {
		return Rule{}, fmt.Errorf("cannot use rule %q: %w", clip(s), err)
	}
	r.text = r.format()
	return r, nil
}

func clip(s string) string {
	if len(s) > 120 {
		return s[:120] + "..."
	}
	return s
}

func (r *Rule) parse(s string) error {
	if len(s) > maxRuleText {
		return fmt.Errorf("it has %d bytes, the limit is %d: write several rules", len(s), maxRuleText)
	}
	words := strings.Fields(s)
	next := func(after, want string) (string, error) {
		if len(words) == 0 {
			return "", fmt.Errorf("it ends after %q: write %s", after, want)
		}
		w := words[0]
		words = words[1:]
		return w, nil
	}
	decided := false
	for len(words) > 0 {
		w, _ := next("", "")
		if decided {
			return fmt.Errorf("%q comes after the verdict: conditions go before it", clip(w))
		}
		var arg string
		var err error
		switch w {
		case "proto":
			if r.proto != 0 {
				return twice(w)
			}
			if arg, err = next(w, "tcp or udp"); err == nil {
				r.proto, err = parseProto(arg)
			}
		case "dst":
			if r.prefixes != nil {
				return twice(w)
			}
			if arg, err = next(w, "a network such as 192.0.2.0/24, or several with commas between"); err == nil {
				r.prefixes, err = parsePrefixes(arg)
			}
		case "port":
			if r.ports != nil {
				return twice(w)
			}
			if arg, err = next(w, "a port such as 443, or 80,6881-6889"); err == nil {
				r.ports, err = parsePorts(arg)
			}
		case "via":
			if r.via, err = next(w, "the name of an upstream"); err == nil {
				err = CheckName(r.via)
			}
			decided = true
		case DirectName:
			r.via, decided = DirectName, true
		case "reject":
			r.action, decided = ActionReject, true
		case "drop":
			r.action, decided = ActionDrop, true
		default:
			return fmt.Errorf("unknown word %q: conditions are proto, dst and port; verdicts are via NAME, direct, reject and drop", clip(w))
		}
		if err != nil {
			return err
		}
	}
	if !decided {
		return fmt.Errorf("it has no verdict: end it with via NAME, direct, reject or drop")
	}
	return nil
}

func twice(word string) error {
	return fmt.Errorf("%q is there twice: give its values in one list with commas, or write two rules", word)
}

func parseProto(s string) (flow.Proto, error) {
	switch s {
	case "tcp":
		return flow.TCP, nil
	case "udp":
		return flow.UDP, nil
	}
	return 0, fmt.Errorf("protocol %q: write tcp or udp", clip(s))
}

func parsePrefixes(list string) ([]netip.Prefix, error) {
	items := strings.Split(list, ",")
	if len(items) > maxRuleList {
		return nil, fmt.Errorf("%d networks, the limit is %d: write several rules", len(items), maxRuleList)
	}
	out := make([]netip.Prefix, 0, len(items))
	for _, item := range items {
		p, err := parsePrefix(item)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("network %q: write an address or a network, such as 192.0.2.0/24 or 2001:db8::/32", clip(s))
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("network %q: write it in CIDR form, such as 192.0.2.0/24 or 2001:db8::/32", clip(s))
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("network %q: write an IPv4 network in its own form, such as 192.0.2.0/24", clip(s))
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("network %q has bits set behind its length: write %s, or %s for the one address", clip(s), p.Masked(), p.Addr())
	}
	return p, nil
}

func parsePorts(list string) ([]portRange, error) {
	items := strings.Split(list, ",")
	if len(items) > maxRuleList {
		return nil, fmt.Errorf("%d port ranges, the limit is %d: write several rules", len(items), maxRuleList)
	}
	out := make([]portRange, 0, len(items))
	for _, item := range items {
		lo, hi, isRange := strings.Cut(item, "-")
		if !isRange {
			hi = lo
		}
		l, err1 := strconv.ParseUint(lo, 10, 16)
		h, err2 := strconv.ParseUint(hi, 10, 16)
		switch {
		case err1 != nil || err2 != nil || l == 0:
			return nil, fmt.Errorf("port %q: write a number of 1 to 65535, or a range such as 6881-6889", clip(item))
		case l > h:
			return nil, fmt.Errorf("port range %q is empty: write %d-%d", clip(item), h, l)
		}
		out = append(out, portRange{uint16(l), uint16(h)})
	}
	return out, nil
}

// CheckName says whether an upstream may be called s: one word of a rule, and none that a rule reads as another thing.
func CheckName(s string) error {
	ok := s != "" && len(s) <= maxNameLen
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		ok = alnum || i > 0 && (c == '.' || c == '_' || c == '-')
	}
	if !ok {
		return fmt.Errorf("upstream name %q: write letters, digits, '.', '_' and '-', a letter or digit first, at most %d", clip(s), maxNameLen)
	}
	switch s {
	case "reject", "drop", "via":
		return fmt.Errorf("upstream name %q is a word of the rules: choose another", s)
	}
	return nil
}

func (r *Rule) format() string {
	b := make([]byte, 0, 64)
	if r.proto != 0 {
		b = append(append(append(b, "proto "...), r.proto.String()...), ' ')
	}
	for i, p := range r.prefixes {
		b = append(b, [...]string{"dst ", ","}[min(i, 1)]...)
		b = p.AppendTo(b)
	}
	if r.prefixes != nil {
		b = append(b, ' ')
	}
	for i, p := range r.ports {
		b = append(b, [...]string{"port ", ","}[min(i, 1)]...)
		b = strconv.AppendUint(b, uint64(p.lo), 10)
		if p.hi != p.lo {
			b = strconv.AppendUint(append(b, '-'), uint64(p.hi), 10)
		}
	}
	if r.ports != nil {
		b = append(b, ' ')
	}
	switch {
	case r.action == ActionReject:
		b = append(b, "reject"...)
	case r.action == ActionDrop:
		b = append(b, "drop"...)
	case r.via == DirectName:
		b = append(b, DirectName...)
	default:
		b = append(append(b, "via "...), r.via...)
	}
	return string(b)
}

// matches reports whether all conditions hold. dst is unmapped. It does not allocate.
func (r *Rule) matches(proto flow.Proto, dst netip.AddrPort) bool {
	if r.proto != 0 && r.proto != proto {
		return false
	}
	if r.ports != nil {
		port, ok := dst.Port(), false
		for _, p := range r.ports {
			if port >= p.lo && port <= p.hi {
				ok = true
				break
			}
		}
		if !ok {
			return false
		}
	}
	if r.prefixes != nil {
		addr := dst.Addr()
		for _, p := range r.prefixes {
			if p.Contains(addr) {
				return true
			}
		}
		return false
	}
	return true
}
