package kernel

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// clean removes the rules and routes of a daemon that was killed. It refuses to go on, and has touched nothing, when one
// lives or when the table is somebody else's. The routes of a daemon that lives lead into its TUN, those of one that was
// killed went with it (but for an unreachable route).
func (s *Steering) clean() error {
	var rules []*netlink.Rule
	var routes []*netlink.Route
	for _, f := range s.families {
		rs, err := s.staleRoutes(f)
		if err != nil {
			return err
		}
		routes = append(routes, rs...)
		rl, err := s.staleRules(f)
		if err != nil {
			return err
		}
		rules = append(rules, rl...)
	}
	for _, r := range rules {
		if err := s.delRule(r); err != nil {
			return err
		}
	}
	for _, r := range routes {
		if err := s.h.RouteDel(r); err != nil && !gone(err) {
			return fmt.Errorf("cannot remove a route of table %d: %w", r.Table, err)
		}
	}
	if n := len(rules) + len(routes); n > 0 {
		s.o.Log.Warn("removed the ip rules and kernel routes that a killed viasocks had left", "count", n)
	}
	return nil
}

func (s *Steering) staleRoutes(family int) (stale []*netlink.Route, err error) {
	// The filter is set but the table is not: this lists all tables.
	routes, err := s.h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("cannot list kernel routes: %w", err)
	}
	for i := range routes {
		r := &routes[i]
		switch ours := r.Protocol == Protocol; {
		case ours && r.Type == unix.RTN_UNREACHABLE:
			stale = append(stale, r)
		case ours:
			return nil, fmt.Errorf("another viasocks steers it: 'ip route show table %d' has its routes", r.Table)
		case r.Table == s.o.Table:
			return nil, fmt.Errorf("table %d is in use by somebody else: see 'ip route show table %[1]d', and choose another with --table", r.Table)
		}
	}
	return stale, nil
}

func (s *Steering) staleRules(family int) (stale []*netlink.Rule, err error) {
	rules, err := s.h.RuleList(family)
	if err != nil {
		return nil, fmt.Errorf("cannot list ip rules: %w", err)
	}
	for i := range rules {
		r := &rules[i]
		r.Family = family
		switch {
		case r.Protocol == Protocol:
			stale = append(stale, r)
		case r.Table == s.o.Table:
			return nil, fmt.Errorf("an ip rule of somebody else leads to table %d: see 'ip rule', and choose another with --table", r.Table)
		}
	}
	return stale, nil
}
