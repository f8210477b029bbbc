package route

import (
	"fmt"
	"net/netip"
	"os/user"
	"path"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/stack/flow"
)

// items splits a list of values and limits its length.
func items(list, what string) ([]string, error) {
	all := strings.Split(list, ",")
	if len(all) > maxRuleList {
		return nil, fmt.Errorf("%d %s, the limit is %d: write several rules", len(all), what, maxRuleList)
	}
	return all, nil
}

// parseItems parses each value of a list.
func parseItems[T any](list, what string, parse func(string) (T, error)) ([]T, error) {
	all, err := items(list, what)
	if err != nil {
		return nil, err
	}
	out := make([]T, 0, len(all))
	for _, item := range all {
		v, err := parse(item)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
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
	return parseItems(list, "networks", parsePrefix)
}

func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf(
				"network %q: write an address or a network, such as 192.0.2.0/24 or 2001:db8::/32",
				clip(s),
			)
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
		return netip.Prefix{}, fmt.Errorf("network %q has bits set beyond its length: write %s, or %s for the one address",
			clip(s), p.Masked(), p.Addr())
	}
	return p, nil
}

func parsePorts(list string) ([]portRange, error) {
	return parseItems(list, "port ranges", parsePortRange)
}

func parsePortRange(s string) (portRange, error) {
	lo, hi, isRange := strings.Cut(s, "-")
	if !isRange {
		hi = lo
	}
	l, err1 := strconv.ParseUint(lo, 10, 16)
	h, err2 := strconv.ParseUint(hi, 10, 16)
	switch {
	case err1 != nil || err2 != nil || l == 0:
		return portRange{}, fmt.Errorf("port %q: write a number of 1 to 65535, or a range such as 6881-6889", clip(s))
	case l > h:
		return portRange{}, fmt.Errorf("port range %q is empty: write %d-%d", clip(s), h, l)
	}
	return portRange{uint16(l), uint16(h)}, nil
}

// userRange is a range of users. text is the way it was written.
type userRange struct {
	first, last uint32
	text        string
}

// String implements fmt.Stringer.
func (u userRange) String() string { return u.text }

func parseUsers(list string) ([]userRange, error) { return parseItems(list, "users", parseUser) }

func parseUser(s string) (userRange, error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	f, err1 := strconv.ParseUint(first, 10, 32)
	l, err2 := strconv.ParseUint(last, 10, 32)
	if err1 == nil && err2 == nil {
		if f > l {
			return userRange{}, fmt.Errorf("user range %q is empty: write %d-%d", clip(s), l, f)
		}
		return userRange{uint32(f), uint32(l), s}, nil
	}
	u, err := user.Lookup(s)
	if err != nil || s == "" {
		return userRange{}, fmt.Errorf(
			"user %q: there is no such user; write a name, a number, or a range such as 1000-1999",
			clip(s),
		)
	}
	id, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return userRange{}, fmt.Errorf("user %q: cannot find its number: %w", clip(s), err)
	}
	return userRange{uint32(id), uint32(id), s}, nil
}

func parseGroups(list string) ([]string, error) {
	return parseItems(list, "control groups", parseGroup)
}

func parseGroup(s string) (string, error) {
	p := strings.Trim(s, "/")
	if p == "" || path.Clean(p) != p || strings.HasPrefix(p, "..") {
		return "", fmt.Errorf("control group %q: write its path below the root, such as system.slice/foo.service", clip(s))
	}
	return p, nil
}

func parseExes(list string) ([]string, error) { return parseItems(list, "programs", parseExe) }

func parseExe(s string) (string, error) {
	if !strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "*") {
		return "", fmt.Errorf("program %q: write its absolute path, such as /usr/bin/curl, or a pattern such as */curl", clip(s))
	}
	return s, nil
}
