package daemon

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// fakeTTL is the TTL of an answer with a fake address. Programs that keep it longer stay right until another name
// needs the address.
const fakeTTL = 60 * time.Second

// newPool makes the pool of addresses for --dns fake, with the names in its file. It exists in other modes too,
// because a reload may change the mode. If the file cannot be used, names only get other addresses than before.
func newPool(cfg *config.Config, log *slog.Logger) (*dns.Pool, error) {
	p, err := dns.NewPool(dns.PoolConfig{V4: cfg.Fake.Pool, V6: cfg.Fake.Pool6, TTL: fakeTTL})
	if err != nil {
		return nil, fmt.Errorf("cannot use --dns fake: %w", err)
	}
	if !cfg.Host.Takeover { // otherwise another viasocks still writes the file
		loadPool(p, cfg, log)
	}
	return p, nil
}

// loadPool reads the file of the pool, if it has one.
func loadPool(p *dns.Pool, cfg *config.Config, log *slog.Logger) {
	if cfg.Fake.File == "" {
		return
	}
	n, err := p.Load(cfg.Fake.File)
	if err != nil {
		log.Warn("cannot use the file of --dns-pool-file: names get other addresses than before", "err", err)
		return
	}
	log.Debug("names of fake addresses loaded", "file", cfg.Fake.File, "names", n)
}

// givePool writes the names and their addresses to a file in memory for another process. It returns nil if there are none.
func givePool(p *dns.Pool) (*os.File, error) {
	if p == nil {
		return nil, nil
	}
	fd, err := unix.MemfdCreate("viasocks-names", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "names")
	w := bufio.NewWriterSize(f, 64<<10)
	err = p.SaveTo(w)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// takePool loads what givePool wrote, so that an address still stands for the name for which a program has it. It closes
// names. If there is no such file, the one of the configuration is loaded.
func takePool(p *dns.Pool, cfg *config.Config, names *os.File, log *slog.Logger) {
	if names == nil {
		loadPool(p, cfg, log)
		return
	}
	defer names.Close()
	n, err := p.LoadFrom(names)
	if err != nil {
		log.Warn("names get other addresses than before", "err", err)
		return
	}
	log.Debug("names of fake addresses taken over", "names", n)
}

// poolIsFree returns an error if a network of the host overlaps the ranges of fake addresses, or a proxy is in them:
// traffic to an address there would be taken for a connection to a name. The TUN's own addresses may exist from
// before.
func poolIsFree(cfg *config.Config, addrs func() ([]net.Addr, error)) error {
	if !cfg.Fake.On {
		return nil
	}
	for _, u := range cfg.Upstreams {
		for _, s := range u.Reached() {
			a, err := netip.ParseAddr(s.Host())
			if p, in := inside(cfg.Fake.Pools(), a); err == nil && in {
				return fmt.Errorf(
					"cannot use the proxy %s: its address is inside %s, whose addresses stand for names: %s",
					s,
					p,
					elsewhere,
				)
			}
		}
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
		bits, _ := n.Mask.Size()
		for _, p := range cfg.Fake.Pools() {
			if p.Overlaps(netip.PrefixFrom(ip, bits)) {
				return fmt.Errorf(
					"cannot use --dns fake: this host has the address %s/%d, and the addresses of %s stand for names: %s",
					ip,
					bits,
					p,
					elsewhere,
				)
			}
		}
	}
	return nil
}

// elsewhere tells what to do about it.
const elsewhere = "choose others with --dns-pool or --dns-pool6, or give programs real addresses with --dns tcp://ADDRESS"

func inside(all []netip.Prefix, a netip.Addr) (netip.Prefix, bool) {
	i := slices.IndexFunc(all, func(p netip.Prefix) bool { return p.Contains(a.Unmap().WithZone("")) })
	if i < 0 {
		return netip.Prefix{}, false
	}
	return all[i], true
}

// hostHasIPv6 reports whether the kernel has IPv6 at all.
func hostHasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}
