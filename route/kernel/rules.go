package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Positions of the rules, relative to the first.
const (
	atMarked = iota
	atHost
	atExclude
	atDNS
	atLAN
	atStraight
	atAll
	atClosed
	lastRule = 19 // the end, after which the host continues as without us
)

// rule is one ip rule of ours. Rules are equal if they have the same effect.
type rule struct {
	family       int
	prio         int
	mark, mask   uint32
	to           netip.Prefix
	iif, oif     string
	uids         UIDRange
	hasUIDs      bool
	proto        int
	sport, dport PortRange
	table        int // table of the look-up; 0: none
	jump         int // target of the goto; 0: none
	action       uint8
}

// rules returns all of our rules for a family:
//
//	P    fwmark OWN, DIRECT, INBOUND  goto END, those in use
//	P+1  DHCP; the TUN's answers      goto END
//	P+1  fwmark RETURNED              goto P+6, with Opens
//	P+1  fwmark CAPTURED              goto P+3, if a program is included although others are excluded
//	P+2  what is excluded             goto END
//	P+3  port 53                      lookup T
//	P+3  private networks included    lookup T
//	P+4  to connected networks        goto END, or refuse
//	P+4  by a device that leads out   goto END, with Include
//	P+5  what rules let out           goto END
//	P+6                               lookup T
//	P+7                               refuse
//	P+19                              nop
//
// A look-up of main would be wrong for the exceptions: rules after ours, such as those of wg-quick, must apply to
// them as they do without us. Connected networks are rules and not throw routes in T, because T must answer for port
// 53 inside these networks too, and because after a throw the following rule would refuse.
//
// IPv6 refuses with a rule of type unreachable: a look-up for a device skips an unreachable route and continues with
// main.
//
// IPv4 refuses with a table that contains an unreachable route (closedTable). When a route with a gateway is added,
// the kernel looks up the gateway with all ip rules, with no mark, no port and user 0, and refuses the route with
// "Nexthop has invalid gateway" if that look-up fails (fib_check_nh in net/ipv4/fib_semantics.c). DHCP clients do not
// try again, so a new lease would leave the host without a network. No condition of an ip rule distinguishes that
// look-up from a program's, but its scope does: it asks for a route of scope link or narrower, and therefore skips
// the routes of T and of closedTable, which have scope universe. It continues with main and finds the gateway's
// network there. The same holds for sockets with SO_DONTROUTE, which the filter refuses.
func (c *Config) rules(family int, l links) (out []rule) {
	end := c.Priority + lastRule
	add := func(at int, r rule) {
		r.family, r.prio = family, c.Priority+at
		out = append(out, r)
	}
	add(lastRule, rule{action: nl.FR_ACT_NOP})
	for _, m := range c.passing() {
		add(atMarked, rule{mark: m, mask: c.Marks.Mask, jump: end})
	}
	client, server := PortRange{68, 68}, PortRange{67, 67}
	if family == unix.AF_INET6 {
		client, server = PortRange{546, 546}, PortRange{547, 547}
	}
	// This is for packets of this host only, not for those that it forwards.
	add(atHost, rule{iif: "lo", proto: unix.IPPROTO_UDP, sport: client, dport: server, jump: end})
	for _, n := range c.answered(l.lan) {
		if familyOf(n.Addr()) == family {
			add(atHost, rule{iif: c.TUN, to: n, jump: end})
		}
	}
	if c.Opens {
		add(atHost, c.openedRule())
	}
	if c.outranks() {
		add(atHost, rule{mark: c.Marks.Captured, mask: c.Marks.Mask, jump: c.Priority + atDNS})
	}
	for _, r := range c.excludeRules(family) {
		r.jump = end
		add(atExclude, r)
	}
	for _, r := range c.askedRules() {
		add(atDNS, r)
	}
	for _, n := range slices.Concat(c.included(l.lan), c.reserved()) {
		if familyOf(n.Addr()) == family {
			add(atDNS, rule{to: n, table: c.Table})
		}
	}
	for _, r := range c.lanRules(family, l, end) {
		add(atLAN, r)
	}
	if !c.Include.empty() {
		// Sockets that are bound to a device and not included would find nothing in T. The filter refuses those that
		// are included.
		for _, d := range l.out {
			add(atLAN, rule{oif: d, jump: end})
		}
	}
	for _, r := range c.straightRules(family, end) {
		add(atStraight, r)
	}
	// The rule that closes precedes those that steer, so that there is no gap in between.
	if !c.FailOpen {
		add(atClosed, c.refuse(rule{family: family}))
	}
	add(atAll, rule{table: c.Table})
	return out
}

// askedRules returns the ip rules for questions that the TUN answers whatever their destination is: about names and, with
// PortMap, about ports.
func (c *Config) askedRules() (out []rule) {
	for _, p := range []int{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		out = append(out, rule{proto: p, dport: PortRange{53, 53}, table: c.Table})
	}
	if c.PortMap != 0 {
		out = append(out, rule{iif: "lo", proto: unix.IPPROTO_UDP, dport: c.portMap(), table: c.Table})
	}
	return out
}

// excludeRules returns the rules that match what is excluded, without their target.
func (c *Config) excludeRules(family int) (out []rule) {
	x := c.Exclude
	for _, n := range x.Networks {
		if familyOf(n.Addr()) == family {
			out = append(out, rule{to: n.Masked()})
		}
	}
	for _, u := range x.UIDs {
		out = append(out, rule{uids: u, hasUIDs: true})
	}
	for _, p := range x.Ports {
		if p, ok := p.forRule(); ok {
			out = append(out, rule{proto: unix.IPPROTO_TCP, dport: p}, rule{proto: unix.IPPROTO_UDP, dport: p})
		}
	}
	for _, d := range x.Devices {
		out = append(out, rule{iif: d}, rule{oif: d})
	}
	return out
}

// maxRulePort is the largest port that the kernel accepts in an ip rule. It refuses a rule with port 65535 as invalid
// (fib_rule_port_range_valid in include/net/fib_rules.h).
const maxRulePort = 65534

// forRule returns the part of r that an ip rule can match; ok is false if there is none. The chain mark_output covers port
// 65535: its mark leads packets past the TUN after the first look-up, as it does for control groups.
func (r PortRange) forRule() (part PortRange, ok bool) {
	part = PortRange{max(r.First, 1), min(r.Last, maxRulePort)}
	return part, part.First <= part.Last
}

// lanRules returns the rules for connected private networks, at most one for each. end is the target for those that are
// reached directly.
func (c *Config) lanRules(family int, l links, end int) (out []rule) {
	seen := map[netip.Prefix]bool{}
	for _, n := range l.lan {
		if familyOf(n.prefix.Addr()) != family || seen[n.prefix] {
			continue
		}
		switch {
		case n.guest || c.LAN == LANDirect:
			out = append(out, rule{to: n.prefix, jump: end})
		case c.LAN == LANRefuse:
			out = append(out, c.refuse(rule{family: family, to: n.prefix}))
		default:
			continue
		}
		seen[n.prefix] = true
	}
	return out
}

// closedTable returns the number of the kernel routing table whose only route refuses, for IPv4 only. It is the one
// after T.
func (c *Config) closedTable() int { return c.Table + 1 }

// refuse makes r refuse what it matches, with an error that the program sees at once.
func (c *Config) refuse(r rule) rule {
	if r.family == unix.AF_INET6 {
		r.action = nl.FR_ACT_UNREACHABLE
	} else {
		r.table = c.closedTable()
	}
	return r
}

func (r rule) String() string {
	var b strings.Builder
	if r.family == unix.AF_INET6 {
		b.WriteString("-6 ")
	}
	fmt.Fprintf(&b, "rule add priority %d protocol %d", r.prio, Protocol)
	b.WriteString(r.what())
	return b.String()
}

func (r rule) what() string {
	var b strings.Builder
	say := func(format string, a ...any) { fmt.Fprintf(&b, " "+format, a...) }
	if r.to.IsValid() {
		say("to %s", r.to)
	}
	if r.mark != 0 {
		say("fwmark %#x/%#x", r.mark, r.mask)
	}
	if r.iif != "" {
		say("iif %s", r.iif)
	}
	if r.oif != "" {
		say("oif %s", r.oif)
	}
	if r.hasUIDs {
		say("uidrange %d-%d", r.uids.First, r.uids.Last)
	}
	if r.proto != 0 {
		say("ipproto %s", protoName(uint8(r.proto)))
	}
	for _, p := range []struct {
		word string
		r    PortRange
	}{{"sport", r.sport}, {"dport", r.dport}} {
		switch {
		case p.r.Last == 0:
		case p.r.First == p.r.Last:
			say("%s %d", p.word, p.r.First)
		default:
			say("%s %d-%d", p.word, p.r.First, p.r.Last)
		}
	}
	switch {
	case r.jump != 0:
		say("goto %d", r.jump)
	case r.table != 0:
		say("lookup %d", r.table)
	case r.action == nl.FR_ACT_UNREACHABLE:
		say("type unreachable")
	default:
		say("nop")
	}
	return b.String()
}

// netlink converts the rule for the library.
func (r rule) netlink() *netlink.Rule {
	n := netlink.NewRule()
	n.Family, n.Priority, n.Protocol, n.Type, n.Table = r.family, r.prio, Protocol, r.action, r.table
	n.IifName, n.OifName, n.IPProto = r.iif, r.oif, r.proto
	if r.jump != 0 {
		n.Goto = r.jump
	}
	if r.mark != 0 {
		mask := r.mask
		n.Mark, n.Mask = r.mark, &mask
	}
	if r.to.IsValid() {
		n.Dst = &net.IPNet{IP: r.to.Addr().AsSlice(), Mask: net.CIDRMask(r.to.Bits(), r.to.Addr().BitLen())}
	}
	if r.hasUIDs {
		n.UIDRange = netlink.NewRuleUIDRange(r.uids.First, r.uids.Last)
	}
	if r.sport.Last != 0 {
		n.Sport = netlink.NewRulePortRange(r.sport.First, r.sport.Last)
	}
	if r.dport.Last != 0 {
		n.Dport = netlink.NewRulePortRange(r.dport.First, r.dport.Last)
	}
	return n
}

// ruleFrom converts a rule from the kernel. end is the priority of our last rule. ok is false if n cannot be a rule
// of ours.
func ruleFrom(family, end int, n *netlink.Rule) (r rule, ok bool) {
	r = rule{family: family, prio: max(n.Priority, 0), iif: n.IifName, oif: n.OifName, proto: n.IPProto}
	if n.Mark != 0 {
		r.mark, r.mask = n.Mark, ^uint32(0)
		if n.Mask != nil {
			r.mask = *n.Mask
		}
	}
	if n.Dst != nil {
		if a, ok := netip.AddrFromSlice(n.Dst.IP); ok {
			ones, _ := n.Dst.Mask.Size()
			r.to = netip.PrefixFrom(a.Unmap(), ones)
		}
	}
	if n.UIDRange != nil {
		r.uids, r.hasUIDs = UIDRange{n.UIDRange.Start, n.UIDRange.End}, true
	}
	if n.Sport != nil {
		r.sport = PortRange{n.Sport.Start, n.Sport.End}
	}
	if n.Dport != nil {
		r.dport = PortRange{n.Dport.Start, n.Dport.End}
	}
	switch { // the library does not report the action
	case n.Goto > 0:
		r.jump = n.Goto
	case n.Table != 0:
		r.table = n.Table
	case r.prio == end:
		r.action = nl.FR_ACT_NOP
	default:
		r.action = nl.FR_ACT_UNREACHABLE
	}
	return r, !n.Invert && n.Src == nil
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// listRules returns the rules of a family, ours and those of others.
func listRules(h routing, family int) ([]netlink.Rule, error) {
	rs, err := h.RuleList(family)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot list ip rules: %w", err)
	}
	return rs, nil
}

// gone reports whether err means that the kernel has no such rule or route, or has removed it with its device.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV)
}

func familyName(f int) string {
	if f == unix.AF_INET6 {
		return "IPv6"
	}
	return "IPv4"
}
