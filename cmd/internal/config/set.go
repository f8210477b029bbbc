package config

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/metrics"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
)

// duration returns a setter for a duration between lo and hi.
func duration(lo, hi string, field func(*Config) *timeDuration) func(*Config, value) error {
	l, h := mustDuration(lo), mustDuration(hi)
	return func(c *Config, v value) error {
		d, err := time.ParseDuration(v.text)
		if err != nil {
			return v.err("must be a time like 30s or 5m")
		}
		if d < l || d > h {
			return v.err("must be from %s to %s", lo, hi)
		}
		*field(c) = d
		return nil
	}
}

// span formats d as it is written for an option: 2h, not 2h0m0s.
func span(d time.Duration) string {
	s := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, zero) {
			s = s[:len(s)-2]
		}
	}
	return s
}

func mustDuration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		panic(err)
	}
	return d
}

// number returns a setter for a whole number between lo and hi.
func number(lo, hi int, field func(*Config) *int) func(*Config, value) error {
	return func(c *Config, v value) error {
		n, err := strconv.Atoi(v.text)
		if err != nil || n < lo || n > hi {
			return v.err("must be a number from %d to %d", lo, hi)
		}
		*field(c) = n
		return nil
	}
}

func setProxy(c *Config, v value) error   { c.proxyAt = v; return nil }
func setProxyCA(c *Config, v value) error { c.proxyCA = v; return nil }

func addUpstream(c *Config, v value) error {
	name, text, ok := strings.Cut(v.text, "=")
	if !ok {
		return v.err("must be NAME=URL")
	}
	if err := route.CheckName(name); err != nil {
		return v.err("%v", err)
	}
	if name == DefaultUpstream || name == route.DirectName {
		return v.err("the name %s is taken", name)
	}
	for _, u := range c.Upstreams {
		if u.Name == name {
			return v.err("there is already an upstream %s", name)
		}
	}
	u, err := parseGroup(v, Upstream{Name: name}, text)
	if err != nil {
		return err
	}
	c.Upstreams = append(c.Upstreams, u)
	return nil
}

func addRule(c *Config, v value) error {
	r, err := route.ParseRule(v.text)
	if err != nil {
		// The wrapped error tells what is wrong without naming the rule again.
		return v.err("%v", cmp.Or(errors.Unwrap(err), err))
	}
	if list := r.List(); list != "" {
		if info, err := os.Stat(list); err == nil {
			c.warnOfWriters("list", list, info)
		}
	}
	c.Rules = append(c.Rules, r)
	return nil
}

// maxResolvers limits the list; resolv.conf allows three.
const maxResolvers = 8

func setDNS(c *Config, v value) error {
	if v.text == "off" {
		c.DNSOff = true
		return nil
	}
	rest := v.text
	for _, mode := range []struct {
		name string
		on   *bool
	}{{"fake", &c.Fake.On}, {"relay", &c.Relay}} {
		first, others, _ := strings.Cut(rest, ",")
		if strings.TrimSpace(first) == mode.name {
			*mode.on, rest = true, others
		}
	}
	if rest == "" && v.text != "" { // finishDNS sets the default
		return nil
	}
	scheme := ""
	for _, s := range strings.Split(rest, ",") {
		s = strings.TrimSpace(s)
		if before, _, ok := strings.Cut(s, "://"); ok {
			scheme = before
		} else if s == "tor" {
			scheme = ""
		} else if scheme == "" {
			return v.err("must be off, or one or several of fake, relay and resolvers (tcp://HOST, tls://HOST, " +
				"https://HOST/PATH, tor) in this order, with commas between them")
		} else {
			s = scheme + "://" + s
		}
		r, err := dns.ParseResolver(s)
		if err != nil {
			return v.err("%q %v", s, err)
		}
		c.DNS = append(c.DNS, r)
	}
	if len(c.DNS) > maxResolvers {
		return v.err("more than %d resolvers", maxResolvers)
	}
	return nil
}

func setDNSCA(c *Config, v value) error { c.dnsCA = v; return nil }

func setDNSPool(c *Config, v value) error {
	p, err := netip.ParsePrefix(v.text)
	if err != nil || p.Masked() != p || !flow.Pool4.Overlaps(p) || p.Bits() < flow.Pool4.Bits() || p.Bits() > maxPoolBits {
		return v.err("must be a network inside %s, which viasocks keeps for itself, and of 512 addresses at least", flow.Pool4)
	}
	c.Fake.Pool = p
	return nil
}

// maxPoolBits is the prefix length of the smallest pool. flow.PoolReserve of its addresses stand for no name.
const maxPoolBits = 23

func setDNSPool6(c *Config, v value) error {
	p, err := netip.ParsePrefix(v.text)
	if err != nil || p.Masked() != p || p.Bits() < uniqueLocal.Bits() || p.Bits() > 64 || !uniqueLocal.Contains(p.Addr()) {
		return v.err("must be a network inside %s, and a /64 or wider", uniqueLocal)
	}
	c.Fake.Pool6 = p
	return nil
}

// uniqueLocal is the range from which everybody may choose networks (RFC 4193, section 3.1). Programs prefer IPv4 to
// it.
var uniqueLocal = netip.MustParsePrefix("fd00::/8")

func setDNSPoolFile(c *Config, v value) error { c.Fake.File = v.text; return nil }

func setIPv6(c *Config, v value) error {
	switch v.text {
	case "auto", "on", "off":
		c.Fake.IPv6 = v.text
		return nil
	}
	return v.err("must be auto, on or off")
}

func setOffload(c *Config, v value) error {
	m, err := tun.ParseMode(v.text)
	if err != nil {
		return v.err("must be full, nouso or off")
	}
	c.Offload = m
	return nil
}

func setUDPGSO(c *Config, v value) error {
	g, err := relay.ParseGSO(v.text)
	if err != nil {
		return v.err("must be auto, on or off")
	}
	c.UDPGSO = g
	return nil
}

// boolean returns a setter for an option without a value.
func boolean(field func(*Config) *bool) func(*Config, value) error {
	return func(c *Config, v value) error {
		b, err := strconv.ParseBool(v.text)
		if err != nil {
			return v.err("must be true or false, or stand alone")
		}
		*field(c) = b
		return nil
	}
}

func setTUN(c *Config, v value) error {
	if !deviceName(v.text) || v.text == "lo" {
		return v.err("must be 1 to 15 bytes without space, slash, colon and percent sign, and not lo")
	}
	c.TUN = v.text
	return nil
}

func setMark(c *Config, v value) error {
	m, k, masked := strings.Cut(v.text, "/")
	mark, err := strconv.ParseUint(m, 0, 32)
	mask, maskErr := uint64(0xffffffff), error(nil)
	if masked {
		mask, maskErr = strconv.ParseUint(k, 0, 32)
	}
	if err != nil || maskErr != nil || mark == 0 || mark&^mask != 0 {
		return v.err("must be a number other than 0, and a mask that covers it, like 0x100/0xff00")
	}
	c.Mark, c.Mask = uint32(mark), uint32(mask)
	return nil
}

func setTable(c *Config, v value) error {
	n, err := strconv.ParseUint(v.text, 0, 32)
	if err != nil || n == 0 || n >= 253 && n <= 255 || n == 1<<32-1 {
		return v.err("must be a number from 1 to 4294967294, but not 253, 254 and 255, which are the kernel's own")
	}
	c.Table = int(n)
	return nil
}

func setLogLevel(c *Config, v value) error {
	switch v.text {
	case "debug", "info", "warn", "error":
		c.logLevelSet = true
		return c.LogLevel.UnmarshalText([]byte(v.text))
	}
	return v.err("must be debug, info, warn or error")
}

// maxStateDir leaves room for the name of the control socket in an address of 108 bytes.
const maxStateDir = 80

func setStateDir(c *Config, v value) error {
	if !filepath.IsAbs(v.text) || len(v.text) > maxStateDir {
		return v.err("must be a path that begins with a slash, of at most %d bytes", maxStateDir)
	}
	c.StateDir = filepath.Clean(v.text)
	return nil
}

func addRuleFor(c *Config, v value) error {
	q, err := route.ParseQuestion(v.text)
	if err != nil {
		return v.err("%v", err)
	}
	c.RuleFor = append(c.RuleFor, RuleFor{v.text, q})
	return nil
}

func addImport(c *Config, v value) error { c.Import = append(c.Import, v.text); return nil }

func setDecisions(c *Config, v value) error { c.Decisions = v.text; return nil }

func setMetrics(c *Config, v value) error {
	at, err := metrics.ParseAddress(v.text)
	if err != nil {
		return v.err("%v", err)
	}
	c.Metrics = at
	if !at.Local() {
		c.Warnings = append(c.Warnings, fmt.Sprintf(
			"--metrics %v: other hosts can read what this host does, unless a firewall keeps them away: "+
				"use 127.0.0.1 or unix:PATH",
			at,
		))
	}
	return nil
}

func setLogFile(c *Config, v value) error { c.LogFile = v.text; return nil }

// finish checks what depends on more than one option, and reads the environment and the password files.
func (c *Config) finish(env []string) error {
	if err := c.checkTarget(); err != nil {
		return err
	}
	if c.Command&(all|Doctor) == 0 || len(c.Import) > 0 || c.Serve {
		return nil // carries nothing
	}
	if !c.logLevelSet && c.Command == Run {
		c.LogLevel = slog.LevelWarn
	}
	if c.MaxPendingPerDest > c.MaxPending {
		return usagef(
			"cannot use --max-pending-per-destination %d: more than --max-pending %d",
			c.MaxPendingPerDest,
			c.MaxPending,
		)
	}
	if err := c.finishProxy(env); err != nil {
		return err
	}
	if err := c.checkChains(); err != nil {
		return err
	}
	if err := c.checkReachHost(); err != nil {
		return err
	}
	if err := c.finishAllow(); err != nil {
		return err
	}
	if err := c.checkSniff(); err != nil {
		return err
	}
	if err := c.finishHost(); err != nil {
		return err
	}
	c.Rules = append(c.excludeExes, c.Rules...)
	if err := c.checkRules(); err != nil {
		return err
	}
	if err := c.finishDNS(); err != nil {
		return err
	}
	if err := c.finishListen(); err != nil {
		return err
	}
	c.finishSplit()
	return nil
}

// checkRules checks the upstreams that rules name. A rule for an unknown upstream would silently refuse traffic that
// the user meant to let through.
func (c *Config) checkRules() error {
	for i := range c.Rules {
		r := &c.Rules[i]
		known := r.Action() != route.ActionVia || r.Via() == route.DirectName
		var names []string
		for _, u := range c.Upstreams {
			known = known || u.Name == r.Via()
			names = append(names, u.Name)
		}
		if !known {
			if len(names) == 0 {
				return usagef("cannot use rule %q: there is no upstream %s: name it with --upstream %[2]s=URL", r, r.Via())
			}
			return usagef("cannot use rule %q: there is no upstream %s, only %s", r, r.Via(), strings.Join(names, ", "))
		}
	}
	return nil
}
