package kernel

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// listRoutes lists the routes of a family in all tables.
func (h *Host) listRoutes(family int) ([]netlink.Route, error) {
	// The filter is set but the table is unspecified: this lists all tables.
	routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot list kernel routes: %w", err)
	}
	return routes, nil
}

func defaultNet(family int) *net.IPNet {
	if family == unix.AF_INET6 {
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

// source returns the address that main would choose for the Internet. UDP servers on wildcard sockets answer from it,
// and traffic that is rerouted past the TUN after the choice already has it. nil: main leads nowhere.
func (h *Host) source(family int) net.IP {
	far := net.IPv4(192, 88, 99, 1) // any public address; nothing is sent
	if family == unix.AF_INET6 {
		far = net.ParseIP("2001:4860::1")
	}
	rs, err := h.nl.RouteGetWithOptions(far, &netlink.RouteGetOptions{Mark: h.c.Marks.Own})
	if err != nil || len(rs) == 0 || rs[0].Type != unix.RTN_UNICAST || rs[0].Table == h.c.Table {
		return nil
	}
	if src := rs[0].Src; !src.IsLoopback() && !src.IsLinkLocalUnicast() {
		return src
	}
	return nil
}

// wantRoutes returns our routes for a family. tun is the index of the TUN, or 0 if there is none.
//
// Table T has the default route into the TUN. Its scope is universe, not the link that ip(8) would choose for a route
// without a gateway: see closedTable.
//
// The table after it (closedTable) refuses everything, for IPv4 only: see rules.
func (h *Host) wantRoutes(family, tun int) (out []*netlink.Route) {
	if family == unix.AF_INET {
		out = append(out, h.refusing(family, h.c.closedTable()))
	}
	if tun != 0 {
		out = append(out, &netlink.Route{
			LinkIndex: tun, Table: h.c.Table, Protocol: Protocol, Family: family, Type: unix.RTN_UNICAST,
			Scope: netlink.SCOPE_UNIVERSE, Dst: defaultNet(family), Src: h.source(family),
		})
	}
	return out
}

// refusing returns a default route that refuses everything.
func (h *Host) refusing(family, table int) *netlink.Route {
	return &netlink.Route{
		Table: table, Protocol: Protocol, Family: family, Type: unix.RTN_UNREACHABLE,
		Scope: netlink.SCOPE_UNIVERSE, Dst: defaultNet(family),
	}
}

func routeText(r *netlink.Route, tun string) string {
	var b strings.Builder
	b.WriteString("ip ")
	if r.Family == unix.AF_INET6 {
		b.WriteString("-6 ")
	}
	b.WriteString("route replace ")
	if r.Type == unix.RTN_UNREACHABLE {
		b.WriteString("unreachable default")
	} else {
		b.WriteString("default dev " + tun)
	}
	fmt.Fprintf(&b, " table %d protocol %d", r.Table, Protocol)
	if r.Family == unix.AF_INET {
		b.WriteString(" scope global")
	}
	if r.Src != nil {
		b.WriteString(" src " + r.Src.String())
	}
	return b.String()
}

// sameRoute reports whether r has the effect of want. An IPv6 default route that refuses is as good as one into a TUN
// without IPv6.
func (h *Host) sameRoute(r, want *netlink.Route) bool {
	if want.Family == unix.AF_INET6 && h.tunNoIPv6 && r.Type == unix.RTN_UNREACHABLE {
		return true
	}
	if r.Type != want.Type || want.Family == unix.AF_INET && r.Scope != want.Scope {
		return false
	}
	return r.Type == unix.RTN_UNREACHABLE || r.LinkIndex == want.LinkIndex && r.Src.Equal(want.Src)
}

// syncRoutes brings our tables into the intended state. It returns what it changed.
func (h *Host) syncRoutes(family, tun int) (changed []string, err error) {
	want := h.wantRoutes(family, tun)
	for _, table := range []int{h.c.Table, h.c.closedTable()} {
		routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return changed, fmt.Errorf("cannot list kernel routes: %w", err)
		}
		for i := range routes {
			r := &routes[i]
			if r.Protocol != Protocol {
				continue
			}
			ones, _ := maskOf(r.Dst)
			at := slices.IndexFunc(want, func(w *netlink.Route) bool { return w.Table == table })
			switch {
			case ones == 0 && at >= 0 && h.sameRoute(r, want[at]):
				want = slices.Delete(want, at, at+1) // it exists
				continue
			case ones == 0 && at >= 0 && r.LinkIndex == want[at].LinkIndex && r.Priority == want[at].Priority:
				continue // the new route replaces it below
			}
			if err := h.delRoute(r); err != nil {
				return changed, err
			}
			changed = append(changed, "stale route")
		}
	}
	for _, r := range want {
		if r, err = h.addRoute(r); err != nil {
			return changed, err
		}
		changed = append(changed, routeText(r, h.c.TUN))
	}
	return changed, nil
}

// addRoute adds a route of ours, or a variant that the kernel accepts, and returns what it added.
func (h *Host) addRoute(r *netlink.Route) (*netlink.Route, error) {
	if err := step(); err != nil {
		return nil, err
	}
	err := h.nl.RouteReplace(r)
	if errors.Is(err, unix.EINVAL) && r.Src != nil { // the address disappeared meanwhile
		r.Src = nil
		err = h.nl.RouteReplace(r)
	}
	if r.Family == unix.AF_INET6 && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)) {
		// IPv6 must not go past the proxy just because it is disabled on one device.
		h.tunNoIPv6 = true
		h.say("no IPv6", "the TUN device has no IPv6: IPv6 is refused", "why", err)
		r = h.refusing(r.Family, r.Table)
		err = h.nl.RouteReplace(r)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot add the %s default route to table %d: %w", familyName(r.Family), r.Table, err)
	}
	return r, nil
}

func (h *Host) delRoute(r *netlink.Route) error {
	if err := step(); err != nil {
		return err
	}
	if err := h.nl.RouteDel(r); err != nil && !gone(err) {
		return fmt.Errorf("cannot remove a route of table %d: %w", r.Table, err)
	}
	return nil
}

// syncRules brings the rules of a family into the intended state: it adds what is missing, in the order of c.rules,
// and then removes what is superfluous.
func (h *Host) syncRules(family int, l links) (changed []string, err error) {
	want := h.c.rules(family, l)
	list, err := listRules(h.nl, family)
	if err != nil {
		return nil, err
	}
	end := h.c.Priority + lastRule
	var stale []*netlink.Rule
	have := map[rule]bool{}
	for i := range list {
		n := &list[i]
		n.Family = family
		if n.Protocol != Protocol {
			h.foreign(family, n)
			continue
		}
		r, ok := ruleFrom(family, end, n)
		if !ok || have[r] || !slices.Contains(want, r) {
			stale = append(stale, n)
			continue
		}
		have[r] = true
	}
	for _, r := range want {
		if have[r] {
			continue
		}
		if err := step(); err != nil {
			return changed, err
		}
		if err := h.nl.RuleAdd(r.netlink()); err != nil && !errors.Is(err, unix.EEXIST) {
			return changed, fmt.Errorf("cannot add the %s rule %q: %w", familyName(family), r, err)
		}
		changed = append(changed, "ip "+r.String())
	}
	for _, n := range stale {
		if err := h.delRule(n); err != nil {
			return changed, err
		}
		changed = append(changed, "stale rule at "+fmt.Sprint(n.Priority))
	}
	return changed, nil
}

func (h *Host) delRule(n *netlink.Rule) error {
	if err := step(); err != nil {
		return err
	}
	if err := h.nl.RuleDel(n); err != nil && !gone(err) {
		return fmt.Errorf("cannot remove the %s rule at %d: %w", familyName(n.Family), n.Priority, err)
	}
	return nil
}

// ruleWords describes a rule of another program in the words of ip(8).
func ruleWords(family int, n *netlink.Rule) string {
	var b strings.Builder
	if n.Invert {
		b.WriteString(" not")
	}
	if n.Src != nil {
		b.WriteString(" from " + n.Src.String())
	}
	if n.Tos != 0 {
		fmt.Fprintf(&b, " tos %#x", n.Tos)
	}
	if n.TunID != 0 {
		fmt.Fprintf(&b, " tun_id %d", n.TunID)
	}
	r, _ := ruleFrom(family, n.Priority, n) // the library does not report the action of a rule without a table or goto
	b.WriteString(strings.TrimSuffix(r.what(), " nop"))
	if n.SuppressPrefixlen >= 0 {
		fmt.Fprintf(&b, " suppress_prefixlength %d", n.SuppressPrefixlen)
	}
	return b.String()
}

// foreign warns about a rule of another program that comes before ours. The filter blocks what it misdirects.
func (h *Host) foreign(family int, n *netlink.Rule) {
	what, hint, ahead := h.c.ahead(family, n)
	if !ahead {
		return
	}
	if hint != "" {
		hint = ": with " + hint + " ours are asked first"
	}
	h.say(
		"rule "+what,
		"an ip rule of another program comes before ours: traffic that it routes without the proxy is refused"+hint,
		"rule",
		what,
	)
}

// ahead describes a rule of another program that comes before ours, and names the option that puts ours first, if
// there is one.
func (c *Config) ahead(family int, n *netlink.Rule) (what, option string, ahead bool) {
	if n.Priority == 0 || n.Priority > c.Priority+atAll {
		return "", "", false
	}
	if p := n.Priority - lastRule - 1; p > 0 {
		option = fmt.Sprintf("--priority %d", p)
	}
	return fmt.Sprintf("%s %d:%s", familyName(family), n.Priority, ruleWords(family, n)), option, true
}

// removeSteering removes all rules and routes with our protocol number, in any table, and returns which.
func (h *Host) removeSteering() (removed []string, err error) {
	for _, f := range h.families {
		list, lerr := listRules(h.nl, f)
		if lerr != nil {
			return removed, lerr
		}
		// Rules that steer are removed before those that close, and the target of the gotos last.
		order := func(n *netlink.Rule) int {
			switch n.Priority - h.c.Priority {
			case atAll, atDNS:
				return 0
			case lastRule:
				return 2
			}
			return 1
		}
		slices.SortStableFunc(list, func(a, b netlink.Rule) int { return order(&a) - order(&b) })
		for i := range list {
			n := &list[i]
			if n.Family = f; n.Protocol != Protocol {
				continue
			}
			if err := h.delRule(n); err != nil {
				return removed, err
			}
			removed = append(removed, fmt.Sprintf("%s rule at %d", familyName(f), n.Priority))
		}
	}
	for _, f := range h.families {
		routes, rerr := h.listRoutes(f)
		if rerr != nil {
			return removed, rerr
		}
		for i := range routes {
			if routes[i].Protocol != Protocol {
				continue
			}
			if err := h.delRoute(&routes[i]); err != nil {
				return removed, err
			}
			removed = append(removed, fmt.Sprintf("%s route of table %d", familyName(f), routes[i].Table))
		}
	}
	return removed, nil
}
