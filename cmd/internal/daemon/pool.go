package daemon

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// fakeTTL is for how long an answer with a fake address may be kept. Programs that keep it longer are right for as long as
// nobody needs the address.
const fakeTTL = 60 * time.Second

// newPool makes what --dns fake gives addresses from, with the names that its file has; nil: there are no fake addresses. A
// file that cannot be used costs only that names get other addresses than before.
func newPool(cfg *config.Config, log *slog.Logger) (*dns.Pool, error) {
	if !cfg.Fake.On {
		return nil, nil
	}
	p, err := dns.NewPool(dns.PoolConfig{V4: cfg.Fake.Pool, V6: flow.Pool6, TTL: fakeTTL})
	if err != nil {
		return nil, fmt.Errorf("cannot use --dns fake: %w", err)
	}
	if cfg.Fake.File == "" {
		return p, nil
	}
	n, err := p.Load(cfg.Fake.File)
	if err != nil {
		log.Warn("names get other addresses than before: the file of --dns-pool-file is not used", "err", err)
	} else {
		log.Debug("names of fake addresses loaded", "file", cfg.Fake.File, "names", n)
	}
	return p, nil
}

// poolIsFree says which of the host's own addresses is inside the ranges of fake addresses: what is sent to it would be taken
// for a connection to a name. The TUN's own may be there from before.
func poolIsFree(cfg *config.Config, addrs func() ([]net.Addr, error)) error {
	if !cfg.Fake.On {
		return nil
	}
	all, err := addrs()
	if err != nil {
		return fmt.Errorf("cannot see the addresses of this host: %w", err)
	}
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, _ := netip.AddrFromSlice(n.IP)
		ip = ip.Unmap()
		if ip == flow.TUN4 || ip == flow.TUN6 {
			continue
		}
		for _, p := range []netip.Prefix{cfg.Fake.Pool, flow.Pool6} {
			if p.Contains(ip) {
				return fmt.Errorf("cannot use --dns fake: this host has the address %s, inside %s, whose addresses stand for names: "+
					"take another part of %s with --dns-pool", ip, p, flow.Pool4)
			}
		}
	}
	return nil
}

// hostHasIPv6 reports whether the kernel has IPv6 at all.
func hostHasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}
