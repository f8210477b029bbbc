package daemon

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/owner"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/tun/netns"
)

// A proxy on this host is a program like any other: `up` would lead its connections into the TUN and from there back
// to the proxy, which would make the next connection. Its traffic must go past viasocks. If it has its own control
// group or user, that is excluded automatically. Otherwise the user must choose, and until then loopGuard refuses
// what comes back.

// localProxy is a proxy that listens on this host, or will.
type localProxy struct {
	server string // as in messages
	at     netip.AddrPort
	owner  netns.Owner // of the listening socket; zero: nothing listens yet
	cgroup string      // below the root of version 2; "": unknown, or the root
	exe    string      // of a process that listens; "": not visible
}

func (p *localProxy) String() string {
	return fmt.Sprintf("the proxy %s runs on this host (%s)", p.server, p.who())
}

// who listens.
func (p *localProxy) who() string {
	if p.exe != "" {
		return fmt.Sprintf("%s, user %d", p.exe, p.owner.UID)
	}
	return fmt.Sprintf("user %d", p.owner.UID)
}

// The user numbers that Debian and others give to single services. Lower ones are shared, and higher ones belong to
// people.
const firstServiceUser, lastServiceUser = 100, 999

// serviceCgroup returns the control group if it belongs to a single service, or "".
func (p *localProxy) serviceCgroup() string {
	unit := path.Base(p.cgroup)
	if !strings.HasSuffix(unit, ".service") || strings.HasPrefix(unit, "user@") {
		return "" // a session, a container, or all programs of a user
	}
	return p.cgroup
}

// excludedBy reports whether the proxy's traffic is already excluded by its user or control group.
func (p *localProxy) excludedBy(x *config.Selection) bool {
	uid := p.owner.UID
	return slices.ContainsFunc(x.UIDs, func(r config.Range[uint32]) bool { return r.First <= uid && uid <= r.Last }) ||
		slices.ContainsFunc(x.Cgroups, func(c string) bool { return p.cgroup == c || strings.HasPrefix(p.cgroup, c+"/") })
}

// exclude adds to x what only the proxy has, and returns a description; "": it shares its user and control group with
// others.
func (p *localProxy) exclude(x *config.Selection) string {
	if c := p.serviceCgroup(); c != "" {
		x.Cgroups = append(slices.Clone(x.Cgroups), c)
		return "control group " + c
	}
	if uid := p.owner.UID; uid >= firstServiceUser && uid <= lastServiceUser {
		x.UIDs = append(slices.Clone(x.UIDs), config.Range[uint32]{First: uid, Last: uid})
		return fmt.Sprintf("user %d", uid)
	}
	return ""
}

// hint tells what to do about a proxy that has neither its own user nor its own control group.
func (p *localProxy) hint() string {
	return fmt.Sprintf("exclude what it sends: --exclude with the addresses that it connects to, --exclude-uid %d if nobody "+
		"else is that user, or start it as a service of its own, whose control group is excluded by itself: "+
		"systemd-run --unit=proxy COMMAND", p.owner.UID)
}

// besideLocal returns cfg with the exclusions that proxies on this host need. It logs what it adds, and status shows
// it. watched contains all proxies whose traffic may come back: one without its own user or control group, one that
// does not run yet, and one whose control group may be created again when its service is restarted.
func (u *up) besideLocal(cfg *config.Config) (_ *config.Config, watched []localProxy) {
	next := *cfg
	for _, p := range u.localProxies(cfg) {
		if p.owner != (netns.Owner{}) && !p.excludedBy(&next.Host.Exclude) {
			if what := p.exclude(&next.Host.Exclude); what != "" {
				u.log.Info(p.String()+": what it sends goes past viasocks", "excluded", what)
			}
		}
		watched = append(watched, p)
	}
	return &next, watched
}

// localProxies finds the proxies of cfg that listen on this host now.
func (u *up) localProxies(cfg *config.Config) []localProxy {
	out, err := findLocal(cfg, u.proxyAddrs)
	if err != nil {
		u.log.Debug("cannot look for proxies on this host", "err", err)
	}
	return out
}

// findLocal finds the proxies of cfg that listen on this host now, by the addresses that addrs gives for them.
func findLocal(cfg *config.Config, addrs func(socks.Server) []netip.Addr) (out []localProxy, err error) {
	diag, err := netns.OpenDiag()
	if err != nil {
		return nil, err
	}
	defer diag.Close()
	for _, up := range cfg.Upstreams {
		for _, s := range up.Reached() {
			for _, a := range addrs(s) {
				if !a.IsUnspecified() && !socks.OnHost(a) {
					continue
				}
				p := localProxy{server: s.String(), at: netip.AddrPortFrom(a, s.Port())}
				p.find(diag)
				out = append(out, p)
			}
		}
	}
	return out, nil
}

// find looks up the process that listens.
func (p *localProxy) find(diag *netns.Diag) {
	o, found, err := diag.Listener(p.at)
	if err != nil || !found || o.Inode == p.owner.Inode {
		return
	}
	p.owner, p.exe, p.cgroup = o, "", ""
	if pids := owner.Holders(o.Inode); len(pids) > 0 {
		p.exe = owner.ExeOf(pids[0])
	}
	if o.Cgroup != 0 {
		p.cgroup, _ = kernel.CgroupPath(o.Cgroup)
	}
}

// proxyAddrs returns the known addresses of a proxy. It asks no resolver.
func (u *up) proxyAddrs(s socks.Server) (out []netip.Addr) {
	if s.Unix() != "" {
		return nil // its process is not looked up: see the manual
	}
	host := strings.TrimSuffix(s.Host(), ".")
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap()}
	}
	if host == "localhost" || strings.HasSuffix(host, ".localhost") { // RFC 6761, section 6.3
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	for _, e := range u.allowed.of(s.String()) {
		out = append(out, e.Addr.Addr())
	}
	return out
}

// excludeLocal returns cfg with the exclusions that proxies on this host need, and starts to watch these proxies.
func (u *up) excludeLocal(cfg *config.Config) *config.Config {
	next, watched := u.besideLocal(cfg)
	u.loops.watch(watched)
	return next
}

// stopLoop is called when connections of a proxy came back to it, which are refused from then on. A proxy that
// started after us may have its own control group or user, and is excluded then.
func (u *up) stopLoop(p localProxy) {
	next, watched := u.besideLocal(u.config())
	for _, q := range watched {
		if q.at != p.at || !q.excludedBy(&next.Host.Exclude) {
			continue
		}
		// This is needed even if the names are the same as before, because the kernel identifies a control group by
		// its inode.
		if err := u.host.Change(kernelConfig(next, u.log)); err != nil {
			u.log.Error("cannot exclude the traffic of the proxy on this host", "err", err)
			return
		}
		u.mu.Lock()
		u.cfg = next
		u.mu.Unlock()
		u.loops.watch(watched)
		return
	}
	u.warning(p.String() + ", and its own connections come back to it: they are refused. To mend it, " + p.hint())
}
