package daemon

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/netns"
)

// checkProxies refuses a proxy that cannot be reached, and warns of what may surprise the user.
func (u *up) checkProxies(cfg *config.Config) error {
	for _, up := range cfg.Upstreams {
		for _, s := range up.Reached() {
			a, err := netip.ParseAddr(s.Host())
			if err != nil {
				continue
			}
			a = a.Unmap()
			if p, ours := tunRange(a); ours {
				return fmt.Errorf("cannot use the proxy %s: its address is inside %s, which viasocks uses itself", s, p)
			}
			u.warnExcluded(cfg, s, a)
		}
	}
	return nil
}

// checkNames does the same as checkProxies for the addresses of proxies' names.
func (u *up) checkNames(cfg *config.Config) {
	for _, up := range cfg.Upstreams {
		for _, s := range up.Reached() {
			if _, err := netip.ParseAddr(s.Host()); err == nil {
				continue
			}
			for _, e := range u.allowed.of(s.String()) {
				u.warnExcluded(cfg, s, e.Addr.Addr())
			}
		}
	}
}

func (u *up) warnExcluded(cfg *config.Config, s socks.Server, a netip.Addr) {
	for _, p := range cfg.Host.Exclude.Nets {
		if p.Contains(a.Unmap().WithZone("")) { // a network never contains an address with a zone
			u.warning(
				fmt.Sprintf(
					"the proxy %s is inside the excluded %s: programs reach it, and what it does not ask a password for, "+
						"past viasocks",
					s,
					p,
				),
			)
		}
	}
}

// tunRange returns the range of ours that contains a.
func tunRange(a netip.Addr) (netip.Prefix, bool) { return inside(flow.Ours[:], a) }

// ourAddress is the error for a proxy's name with an address of ours, to which connections would come back to us.
type ourAddress struct {
	addr   netip.Addr
	within netip.Prefix
}

func (e *ourAddress) Error() string {
	return fmt.Sprintf("its name stands for %s, inside %s, which viasocks uses itself", e.addr, e.within)
}

// notOurs removes such addresses. If no other address is left, it returns an error.
func notOurs(addrs []netip.Addr) (others []netip.Addr, err error) {
	for _, a := range addrs {
		if p, ours := tunRange(a); ours {
			err = &ourAddress{a.Unmap(), p}
			continue
		}
		others = append(others, a)
	}
	if len(others) > 0 {
		return others, nil
	}
	return nil, err
}

// openTUN makes the TUN, or takes the existing one, and returns its intended state. persist: it stays when we are
// gone. onLink, if not nil, is called when its link changes, until it is closed.
func openTUN(cfg *config.Config, e *env, persist bool, onLink func()) (dev tun.Device, w netns.Wanted, err error) {
	queues, name, err := netns.OpenTUN(netns.TUNOptions{
		Name: cfg.TUN, MTU: cfg.MTU, VnetHdr: true, Persist: persist, Queues: tun.Queues,
	})
	if err != nil {
		return nil, w, err
	}
	dev, err = tun.FromFiles(queues, tun.Options{MTU: cfg.MTU, Offload: cfg.Offload, Log: e.log, OnLink: onLink})
	if err != nil {
		return nil, w, err
	}
	if w, err = wantedTUN(cfg, name); err != nil {
		dev.Close()
		return nil, w, err
	}
	return dev, w, nil
}

// wantedTUN brings the TUN into its intended state, and returns that state.
func wantedTUN(cfg *config.Config, name string) (netns.Wanted, error) {
	w := netns.Wanted{Name: name, MTU: cfg.MTU, Addrs: tunAddrs}
	ipv6, err := netns.Configure(name, cfg.MTU, tunAddrs, false)
	if err != nil {
		return w, err
	}
	if !ipv6 {
		w.Addrs = only4(w.Addrs)
	}
	link, err := net.InterfaceByName(name)
	if err != nil {
		return w, fmt.Errorf("cannot find the TUN device again: %w", err)
	}
	w.Index = link.Index
	return w, nil
}

// only4 removes the IPv6 addresses, for a host without IPv6.
func only4(addrs []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(addrs), func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// alone runs before anything is changed. It checks that the needed privileges and devices are there, and that no
// other daemon steers this host until lock is closed. path is that of the control socket. With --takeover, before is
// the daemon that is up, if one is, and lock is shared with it.
func alone(cfg *config.Config) (path string, lock *control.Lock, before *predecessor, err error) {
	if err := needNetAdmin("steer the host", ", or use 'viasocks run' for one program"); err != nil {
		return "", nil, nil, err
	}
	if err := netns.CheckTUN(); err != nil {
		return "", nil, nil, err
	}
	if path, err = control.Path(cfg.StateDir); err != nil {
		return "", nil, nil, err
	}
	if cfg.Host.Takeover {
		before, err = callPredecessor(cfg, path)
		if err != nil {
			return "", nil, nil, err
		}
	}
	if before != nil {
		if lock, err = control.AdoptHost(path, before.talk.Control); err != nil {
			before.end()
			return "", nil, nil, err
		}
		return path, lock, before, nil
	}
	lock, err = takeHost(path)
	return path, lock, nil, err
}

// needNetAdmin reports beforehand, and once, what would otherwise fail at each step.
func needNetAdmin(to, or string) error {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil || data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0 {
		return nil // if it cannot be queried, the kernel will report it
	}
	return errors.New("cannot " + to + ": CAP_NET_ADMIN is missing: run it as root" + or)
}
