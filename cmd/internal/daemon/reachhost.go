package daemon

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun/netns"
)

// hostServices returns what --reach-host asks for; nil: nothing. The connections are made by d.
func hostServices(cfg *config.Config, d *socks.Dialer, noIPv6 bool) *route.HostServices {
	if !cfg.ReachHost.On() {
		return nil
	}
	reach, proxies := cfg.ReachHost, ownProxyPorts(cfg)
	return &route.HostServices{
		Allows: func(port uint16) bool { return reach.Names(port) || reach.All && !slices.Contains(proxies, port) },
		Dialer: d, NoIPv6: noIPv6,
	}
}

// ownProxyPorts returns the ports of the proxies that are on this host. A program that could connect to one of them
// would get past the rules.
func ownProxyPorts(cfg *config.Config) (ports []uint16) {
	for _, u := range cfg.Upstreams {
		for _, s := range u.Reached() {
			if s.Port() != 0 && isHere(s.Host()) {
				ports = append(ports, s.Port())
			}
		}
	}
	return ports
}

// isHere reports whether the host of a URL is this host, as far as that is known without asking a resolver.
func isHere(host string) bool {
	host = strings.TrimSuffix(host, ".")
	if a, err := netip.ParseAddr(host); err == nil {
		return a.IsUnspecified() || socks.OnHost(a.Unmap())
	}
	return host == "localhost" || strings.HasSuffix(host, ".localhost") // RFC 6761, section 6.3
}

// hostEntry returns the entry for the program's /etc/hosts, which it needs if viasocks does not answer its DNS questions.
func hostEntry(cfg *config.Config) netns.HostEntry {
	if !cfg.ReachHost.On() || !cfg.DNSOff {
		return netns.HostEntry{}
	}
	return netns.HostEntry{Name: route.HostServiceName, Addrs: []netip.Addr{flow.Gateway4, flow.Gateway6}}
}
