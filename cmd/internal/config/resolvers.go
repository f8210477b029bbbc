package config

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
)

// defaultDNS is the mode if --dns is not given and the proxies accept names; see finishDNS.
const defaultDNS = "fake"

// defaultResolvers are asked through the proxy if --dns names none.
const defaultResolvers = "tcp://1.1.1.1,9.9.9.9"

// The host's own list of resolvers, and the list that systemd-resolved asks, whose stub may be in the first. They are
// variables for tests.
var (
	resolvConf = "/etc/resolv.conf"
	beyondStub = "/run/systemd/resolve/resolv.conf"
)

// maxResolvConf is far more than glibc reads.
const maxResolvConf = 64 << 10

// finishDNS decides who answers the program's questions, and through which upstream resolvers are asked if no rule
// decides: through that of --proxy or, if there is no proxy at all, directly. In the latter case the host's own
// resolvers are the default, because they may be the only ones that can be reached and that know the names of this
// network.
//
// Names become fake addresses unless --dns says otherwise, there is no proxy, or one of the upstreams has only SOCKS4
// servers, which do not accept names.
func (c *Config) finishDNS() error {
	switch {
	case len(c.Upstreams) == 0:
		c.ResolverDefault = route.DirectName
	case c.Upstreams[0].Name == DefaultUpstream:
		c.ResolverDefault = DefaultUpstream
	}
	if err := c.finishDNSCA(); err != nil {
		return err
	}
	c.NamesDNS = len(c.DNS) > 0
	if !c.Relay && !c.DNSOff && len(c.DNS) == 0 && c.takesNames() {
		c.Fake.On = true
	}
	if c.Fake.On {
		if len(c.Upstreams) == 0 {
			return usagef("cannot use --dns fake without a proxy: no proxy would resolve the names")
		}
		if err := c.checkPools(); err != nil {
			return err
		}
	}
	if slices.Contains(c.DNS, dns.Resolver{Kind: dns.Tor}) && !c.torIsDefault() {
		return usagef("cannot use --dns tor: --proxy has no server that is a Tor: add ?tor to its URL if it is one")
	}
	switch {
	case len(c.DNS) > 0 || c.DNSOff:
		return nil
	case len(c.Upstreams) > 0 && c.torIsDefault():
		return setDNS(c, value{"dns", "tor," + defaultResolvers, "--dns tor," + defaultResolvers})
	case len(c.Upstreams) > 0:
		return setDNS(c, value{"dns", defaultResolvers, "--dns " + defaultResolvers})
	}
	if c.Command == Doctor {
		return nil // it says itself that there is no proxy
	}
	var err error
	c.DNS, err = hostResolvers(c.Command == Up)
	return err
}

// torIsDefault reports whether resolvers are asked through a Tor if no rule decides.
func (c *Config) torIsDefault() bool {
	return c.ResolverDefault == DefaultUpstream && slices.ContainsFunc(c.Upstreams[0].Servers(), socks.Server.Tor)
}

// finishDNSCA reads the certificates of --dns-ca.
func (c *Config) finishDNSCA() error {
	if c.dnsCA.name == "" {
		return nil
	}
	pem, err := c.readCertificates(c.dnsCA.text)
	if err != nil {
		return err
	}
	c.DNSRoots = x509.NewCertPool()
	if !c.DNSRoots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("cannot use the certificates %s: it contains no certificate in PEM format", c.dnsCA.text)
	}
	return nil
}

// checkPools refuses ranges of fake addresses that must not come to viasocks, or that another part of the
// configuration uses.
func (c *Config) checkPools() error {
	for _, pool := range c.Fake.Pools() {
		for _, p := range c.Host.Exclude.Nets {
			if p.Overlaps(pool) {
				return usagef(
					"cannot use --exclude %s with --dns fake: the addresses of %s, which stand for names, "+
						"must come to viasocks: "+
						"take other addresses with --dns-pool or --dns-pool6, or real ones with --dns tcp://ADDRESS",
					p,
					pool,
				)
			}
		}
		for _, r := range c.DNS {
			if pool.Contains(r.Addr.Addr()) {
				return usagef("cannot use the resolver %s: it is inside %s, whose addresses stand for names", r, pool)
			}
		}
	}
	return nil
}

// takesNames reports whether there are proxies, and every upstream has one that accepts names.
func (c *Config) takesNames() bool {
	for i := range c.Upstreams {
		servers := c.Upstreams[i].Servers()
		if !slices.ContainsFunc(servers, socks.Server.TakesNames) {
			return false
		}
	}
	return len(c.Upstreams) > 0
}

// hostResolvers returns the resolvers of resolv.conf(5). When the whole host is steered (up), it leaves out one on
// the host itself, whose own questions would come back to viasocks.
func hostResolvers(up bool) ([]dns.Resolver, error) {
	all, err := nameservers(resolvConf)
	if err != nil {
		return nil, fmt.Errorf("cannot find the host's resolvers: %w: name one with --dns tcp://ADDRESS", err)
	}
	if len(all) == 0 {
		all = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})} // resolv.conf(5)
	}
	if up {
		if all = notLoopback(all); len(all) == 0 {
			real, _ := nameservers(beyondStub)
			all = notLoopback(real)
		}
		if len(all) == 0 {
			return nil, fmt.Errorf(
				"cannot use the host's resolvers: those in %s run on this host, and their own questions would "+
					"come back to viasocks: name others with --dns tcp://ADDRESS",
				resolvConf,
			)
		}
	}
	var out []dns.Resolver
	for _, a := range all[:min(len(all), maxResolvers)] {
		out = append(out, dns.OverTCP(netip.AddrPortFrom(a, 53)))
	}
	return out, nil
}

func notLoopback(all []netip.Addr) (out []netip.Addr) {
	for _, a := range all {
		if !a.IsLoopback() {
			out = append(out, a)
		}
	}
	return out
}

// nameservers returns the addresses in the nameserver lines of a resolv.conf. Like glibc, it skips what is not the
// address of one host. It also skips an address with a zone, which cannot be asked over TCP by number alone.
func nameservers(path string) (out []netip.Addr, err error) {
	b, _, err := readPath(path, maxResolvConf)
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	if len(b) > maxResolvConf {
		return nil, errors.New(path + " is too long")
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(f[1])
		if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
			continue
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}
