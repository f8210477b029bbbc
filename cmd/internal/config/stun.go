package config

import (
	"net"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
)

// maxSTUN is the number of STUN servers whose answers are compared.
const maxSTUN = 2

// setSTUN sets the servers of --stun.
func setSTUN(c *Config, v value) error {
	c.STUN = nil
	for text := range strings.SplitSeq(v.text, ",") {
		s, ok := parseSTUN(text)
		switch {
		case !ok:
			return v.err("must be HOST:PORT or HOST:PORT,HOST:PORT, with names or IPv4 addresses")
		case slices.Contains(c.STUN, s):
			return v.err("it is given twice")
		case len(c.STUN) == maxSTUN:
			return v.err("more than %d servers", maxSTUN)
		}
		c.STUN = append(c.STUN, s)
	}
	return nil
}

// parseSTUN parses HOST:PORT. ok is false unless HOST is a name or an IPv4 address.
func parseSTUN(text string) (s socks.Addr, ok bool) {
	if _, _, err := net.SplitHostPort(text); err != nil {
		return s, false
	}
	r, err := dns.ParseResolver("tcp://" + text) // a resolver has the same form
	s = socks.Addr{Name: r.Name, IP: r.Addr.Addr(), Port: r.Addr.Port()}
	return s, err == nil && (s.Name != "" || s.IP.Is4())
}
