package kernel

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// listRoutes lists all tables of a family.
func (h *Host) listRoutes(family int) ([]netlink.Route, error) {
	// The filter is set but the table is not: this lists all tables.
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

// source is the address that main would choose for the world: UDP servers on wildcard sockets answer from it, and
// what is rerouted past the TUN behind the choice has it already. nil: main leads nowhere.
func (h *Host) source(family int) net.IP {
	far := net.IPv4(192, 88, 99, 1) // any public address: nothing is sent
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

// wantRoute is T's default route; nil: there is no TUN to lead to.
func (h *Host) wantRoute(family, tun int) *netlink.Route {
	if tun == 0 {
		return nil
	}
	r := &netlink.Route{
		LinkIndex: tun, Table: h.c.Table, Protocol: Protocol, Family: family, Type: unix.RTN_UNICAST,
		Scope: netlink.SCOPE_UNIVERSE, Dst: defaultNet(family), Src: h.source(family),
	}
	// Not the scope link that ip(8) would give an IPv4 route without a gateway: who adds a route via a gateway without
	// naming a device has the kernel look for the gateway by our rules, and this one would do as a link to it.
	return r
}

func routeText(r *netlink.Route, dev string) string {
	f, typ, src := "", "", ""
	if r.Family == unix.AF_INET6 {
		f = "-6 "
	}
	switch {
	case r.Type == unix.RTN_UNREACHABLE:
		typ = "unreachable "
	case dev != "":
		dev = " dev " + dev
	}
	if r.Type == unix.RTN_UNREACHABLE {
		dev = ""
	}
	if r.Src != nil {
		src = " src " + r.Src.String()
	}
	scope := ""
	if r.Family == unix.AF_INET && r.Type == unix.RTN_UNICAST {
		scope = " scope global"
	}
	return fmt.Sprintf("ip %sroute replace %sdefault%s table %d protocol %d%s%s", f, typ, dev, r.Table, Protocol, scope, src)
}

// syncRoutes makes T what it should be. It says what it changed.
func (h *Host) syncRoutes(family, tun int) (changed []string, err error) {
	routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: h.c.Table}, netlink.RT_FILTER_TABLE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot list kernel routes: %w", err)
	}
	want := h.wantRoute(family, tun)
	have := false
	for i := range routes {
		r := &routes[i]
		if r.Protocol != Protocol {
			continue
		}
		if ones, _ := maskOf(r.Dst); want != nil && ones == 0 {
			refused := r.Type == unix.RTN_UNREACHABLE && family == unix.AF_INET6 && h.tunNoIPv6
			have = have || refused || r.LinkIndex == want.LinkIndex && r.Type == want.Type && (want.Src == nil && r.Src == nil || r.Src.Equal(want.Src))
			continue // replaced below, if it is another
		}
		if err := h.delRoute(r); err != nil {
			return changed, err
		}
		changed = append(changed, "stale route")
	}
	if want == nil || have {
		return changed, nil
	}
	if err := step(); err != nil {
		return changed, err
	}
	err = h.nl.RouteReplace(want)
	if errors.Is(err, unix.EINVAL) && want.Src != nil { // the address went meanwhile
		want.Src = nil
		err = h.nl.RouteReplace(want)
	}
	if family == unix.AF_INET6 && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)) {
		// IPv6 must not pass by the proxy because it is switched off on one device.
		h.tunNoIPv6 = true
		h.say("no IPv6", "the TUN device has no IPv6: IPv6 is refused", "why", err)
		want = &netlink.Route{Table: h.c.Table, Protocol: Protocol, Family: family, Dst: want.Dst, Type: unix.RTN_UNREACHABLE}
		err = h.nl.RouteReplace(want)
	}
	if err != nil {
		return changed, fmt.Errorf("cannot add the %s default route to table %d: %w", familyName(family), h.c.Table, err)
	}
	return append(changed, routeText(want, h.c.TUN)), nil
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

// syncRules makes the rules of a family what they should be: what is missing is added first, in the order of c.rules,
// then what is too many goes.
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

// foreign warns about a rule of others that is asked before ours. The filter holds what it leads astray.
func (h *Host) foreign(family int, n *netlink.Rule) {
	if n.Priority == 0 || n.Priority > h.c.Priority+atAll {
		return
	}
	what := fmt.Sprintf("%s %d: %s", familyName(family), n.Priority, n)
	h.say("rule "+what, "an ip rule of somebody else is asked before ours: what it leads past the proxy is refused", "rule", what)
}

// removeSteering takes away all rules and routes with our protocol number, whatever their table, and says which.
func (h *Host) removeSteering() (removed []string, err error) {
	for _, f := range h.families {
		list, lerr := listRules(h.nl, f)
		if lerr != nil {
			return removed, lerr
		}
		// What steers goes before what closes, and the end of the gotos last.
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
