package config

import (
	"cmp"
	"errors"
	"net/netip"
	"strings"

	"github.com/viasocks/viasocks/route"
)

// addAllow stores what may leave. The upstream for it is known when all options have been read.
func addAllow(c *Config, v value) error {
	rule, err := allowed(v.text, route.DirectName)
	if err == nil {
		_, err = route.ParseRule(rule)
	}
	if err != nil {
		// The wrapped error tells what is wrong without naming the rule, which the user did not write.
		return v.err("%v", cmp.Or(errors.Unwrap(err), err))
	}
	c.allow = append(c.allow, v.text)
	return nil
}

// allowed returns the rule for PROTO:[HOST:]PORTS.
func allowed(s, upstream string) (string, error) {
	proto, rest, ok := strings.Cut(s, ":")
	if !ok || proto != "tcp" && proto != "udp" {
		return "", errors.New("must be tcp:PORT, udp:PORT, tcp:HOST:PORT or udp:HOST:PORT")
	}
	host, ports := "", rest
	if inside, tail, ok := strings.Cut(strings.TrimPrefix(rest, "["), "]:"); ok && strings.HasPrefix(rest, "[") {
		host, ports = inside, tail
		if host == "" {
			return "", errors.New("there is no address between the brackets")
		}
	} else if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		host, ports = rest[:i], rest[i+1:]
		if host == "" || strings.Contains(host, ":") {
			return "", errors.New("must be tcp:PORT or tcp:HOST:PORT, with an IPv6 address in brackets")
		}
	}
	if strings.Trim(ports, "0123456789,-") != "" && ports != "*" || ports == "" {
		return "", errors.New("the port is missing: write it behind the host as in tcp:example.com:443, or * for all")
	}
	rule := "proto " + proto
	switch _, err := netip.ParseAddr(host); {
	case host == "" || host == "*":
	case err == nil || strings.Contains(host, "/"):
		rule += " dst " + host
	default:
		rule += " name " + host
	}
	if ports != "*" {
		rule += " port " + ports
	}
	if upstream == route.DirectName {
		return rule + " " + upstream, nil
	}
	return rule + " via " + upstream, nil
}

// finishAllow adds rules for what may leave, after the user's own. Nothing else may leave: there is no default.
func (c *Config) finishAllow() error {
	if len(c.allow) == 0 {
		return nil
	}
	upstream := c.Default
	if upstream == "" {
		if len(c.Upstreams) > 0 {
			return usagef("cannot use --allow with --upstream and without --proxy: write rules instead")
		}
		upstream = route.DirectName
	}
	for _, a := range c.allow {
		text, err := allowed(a, upstream)
		if err != nil {
			return err
		}
		r, err := route.ParseRule(text)
		if err != nil {
			return err
		}
		c.Rules = append(c.Rules, r)
	}
	c.Default, c.Guard = "", true
	return nil
}
