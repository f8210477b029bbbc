package daemon

import (
	"log/slog"
	"net/netip"
	"slices"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/tun/netns"
)

// What follows is for `doctor`, which says what the daemon would find.

// KernelConfig is what `up` would ask of route/kernel.
func KernelConfig(cfg *config.Config) kernel.Config {
	return kernelConfig(cfg, slog.New(slog.DiscardHandler))
}

// TUNAddrs are the addresses of the TUN.
func TUNAddrs() []netip.Prefix { return slices.Clone(tunAddrs) }

// Explain says in words for the user why a proxy cannot be used, as `run` and `up` say it at their start.
func Explain(s socks.Server, err error) error { return explain(s, err) }

// LocalProxy is a proxy that listens on this host.
type LocalProxy struct {
	Server   string // its URL, without credentials
	Program  string // who listens, in words
	Excluded string // what `up` leaves out so that the proxy's own connections do not come back to it; empty: it cannot tell them
	Hint     string // what to do then
}

// LocalProxies finds the proxies of cfg that listen on this host, by the addresses that addrs gives for them.
func LocalProxies(cfg *config.Config, addrs func(socks.Server) []netip.Addr) ([]LocalProxy, error) {
	found, err := findLocal(cfg, addrs)
	var out []LocalProxy
	for _, p := range found {
		if p.owner == (netns.Owner{}) {
			continue
		}
		l := LocalProxy{Server: p.server, Program: p.who(), Hint: p.hint()}
		exclude := cfg.Host.Exclude
		if p.excludedBy(&exclude) {
			l.Excluded = "the configuration excludes it"
		} else if what := p.exclude(&exclude); what != "" {
			l.Excluded = what
		}
		out = append(out, l)
	}
	return out, err
}
