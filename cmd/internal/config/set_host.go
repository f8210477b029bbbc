package config

import (
	"net/netip"
	"os/user"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// maxSelected limits each list of a selection, because each entry is checked for each packet or route look-up.
const maxSelected = 256

// oneOf returns a setter for one of several words.
func oneOf(field func(*Config) *string, words ...string) func(*Config, value) error {
	return func(c *Config, v value) error {
		if !slices.Contains(words, v.text) {
			return v.err("must be %s or %s", strings.Join(words[:len(words)-1], ", "), words[len(words)-1])
		}
		*field(c) = v.text
		return nil
	}
}

func setDirect(c *Config, v value) error {
	var word string
	err := oneOf(func(*Config) *string { return &word }, "kernel", "carry")(c, v)
	c.Host.DirectCarry = word == "carry"
	return err
}

func setResolved(c *Config, v value) error {
	var word string
	err := oneOf(func(*Config) *string { return &word }, "auto", "off")(c, v)
	c.Host.Resolved = word == "auto"
	return err
}

var setLAN = oneOf(func(c *Config) *string { return &c.Host.LAN }, "direct", "carry", "refuse")

// listOf returns a setter that appends each item of a comma-separated list.
func listOf[T any](field func(*Config) *[]T, parse func(string) (T, string)) func(*Config, value) error {
	return func(c *Config, v value) error {
		list := field(c)
		for _, s := range strings.Split(v.text, ",") {
			item, wrong := parse(strings.TrimSpace(s))
			if wrong != "" {
				return v.err("%s", wrong)
			}
			if len(*list) == maxSelected {
				return v.err("more than %d", maxSelected)
			}
			*list = append(*list, item)
		}
		return nil
	}
}

func addNetworks(sel func(*Config) *Selection) func(*Config, value) error {
	return listOf(func(c *Config) *[]netip.Prefix { return &sel(c).Nets }, func(s string) (netip.Prefix, string) {
		p, err := netip.ParsePrefix(s)
		if a, aerr := netip.ParseAddr(s); err != nil && aerr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		switch {
		case err != nil:
			return p, strconv.Quote(s) + " is neither an address nor a network like 203.0.113.0/24"
		case p.Bits() == 0:
			return p, strconv.Quote(s) + " is everything"
		case p.Addr().Is4In6():
			return p, strconv.Quote(s) + ": write it as IPv4"
		}
		return p.Masked(), ""
	})
}

func addUIDs(sel func(*Config) *Selection) func(*Config, value) error {
	return listOf(func(c *Config) *[]Range[uint32] { return &sel(c).UIDs }, parseUIDs)
}

// parseUIDs parses a user or a range of numbers, or says why it cannot.
func parseUIDs(s string) (Range[uint32], string) {
	if r, ok := parseRange[uint32](s, 32); ok && r.Last < 1<<32-1 {
		return r, ""
	}
	if s != "" && (s[0] < '0' || s[0] > '9') {
		if u, err := user.Lookup(s); err == nil {
			if r, ok := parseRange[uint32](u.Uid, 32); ok {
				return r, ""
			}
		}
		return Range[uint32]{}, "there is no user " + strconv.Quote(s)
	}
	return Range[uint32]{}, strconv.Quote(s) + " is neither a user nor a range of numbers like 1000-1999"
}

func addPorts(sel func(*Config) *Selection) func(*Config, value) error {
	return listOf(func(c *Config) *[]Range[uint16] { return &sel(c).Ports }, func(s string) (Range[uint16], string) {
		r, ok := parseRange[uint16](s, 16)
		switch {
		case !ok || r.First == 0:
			return r, strconv.Quote(s) + " is not a port from 1 to 65535, or a range like 6881-6889"
		case r.First <= 53 && r.Last >= 53:
			return r, "port 53 is always viasocks': names are asked through the proxy"
		}
		return r, ""
	})
}

// addInboundPorts allows port 53, because a resolver may serve the LAN.
func addInboundPorts(c *Config, v value) error {
	return listOf(func(c *Config) *[]Range[uint16] { return &c.Host.InboundPorts }, func(s string) (Range[uint16], string) {
		r, ok := parseRange[uint16](s, 16)
		if !ok || r.First == 0 {
			return r, strconv.Quote(s) + " is not a port from 1 to 65535, or a range like 27015-27020"
		}
		return r, ""
	})(c, v)
}

func addDevices(sel func(*Config) *Selection) func(*Config, value) error {
	return listOf(func(c *Config) *[]string { return &sel(c).Devices }, func(s string) (string, string) {
		if !deviceName(s) || s == "lo" {
			return s, strconv.Quote(s) +
				" is not the name of a device: 1 to 15 bytes without space, slash, colon and percent sign, and not lo"
		}
		return s, ""
	})
}

func addCgroups(sel func(*Config) *Selection) func(*Config, value) error {
	return listOf(func(c *Config) *[]string { return &sel(c).Cgroups }, func(s string) (string, string) {
		path := strings.Trim(strings.TrimPrefix(s, "/sys/fs/cgroup"), "/")
		if path == "" || strings.Contains(path, "\"") ||
			slices.ContainsFunc(strings.Split(path, "/"), func(e string) bool { return e == "" || e == "." || e == ".." }) {
			return s, strconv.Quote(s) + " is not the path of a control group, like system.slice/chrony.service"
		}
		return path, ""
	})
}

// parseRange parses N or N-M.
func parseRange[T uint16 | uint32](s string, bits int) (r Range[T], ok bool) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, err := strconv.ParseUint(first, 10, bits)
	b, err2 := strconv.ParseUint(last, 10, bits)
	return Range[T]{T(a), T(b)}, err == nil && err2 == nil && a <= b
}

// deviceName is dev_valid_name of the kernel, and additionally excludes %, which would make the name a pattern.
func deviceName(s string) bool {
	return s != "" && len(s) <= 15 && s != "." && s != ".." && !strings.ContainsAny(s, "/:% \t\"")
}

func setNFTable(c *Config, v value) error {
	if !nftName.MatchString(v.text) {
		return v.err("must be a letter and up to 30 more letters, digits, underscores, hyphens and dots")
	}
	c.Host.NFTable = v.text
	return nil
}

var nftName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,30}$`)

func setControlGroup(c *Config, v value) error {
	s := v.text
	if g, err := user.LookupGroup(s); err == nil {
		s = g.Gid
	}
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return v.err("there is no such group")
	}
	c.Host.ControlGroup = int(n)
	return nil
}

// finishHost checks what depends on more than one option.
func (c *Config) finishHost() error {
	h := &c.Host
	if c.Command == Run {
		return nil
	}
	switch {
	case h.LAN == "" && h.Strict:
		h.LAN = "refuse"
	case h.LAN == "":
		h.LAN = "direct"
	case h.LAN == "direct" && h.Strict:
		return usagef("cannot use --lan direct with --strict: --strict refuses the LAN; --lan carry sends it to the proxy")
	}
	if len(h.InboundPorts) > 0 && h.Inbound == "carry" && len(h.Exclude.Devices) == 0 {
		return usagef(
			"cannot use --inbound-port with --inbound carry: nothing is answered directly then, " +
				"unless --exclude-device names a device",
		)
	}
	if h.MembersExclude && h.ControlGroup < 0 {
		c.Warnings = append(c.Warnings, "--members-exclude has no effect without --control-group")
	}
	for _, p := range h.Exclude.Nets {
		if slices.Contains(h.Include.Nets, p) {
			return usagef("cannot include %s: it is excluded too", p)
		}
	}
	return nil
}
