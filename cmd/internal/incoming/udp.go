package incoming

import (
	"net/netip"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/portmap"
)

// maxUDP limits the UDP ports that are kept. Each holds an association of the proxy.
const maxUDP = 32

// udpPort is a UDP port of a program whose mapping is kept. It is guarded by the manager's mu.
type udpPort struct {
	spec  Spec
	of    Spec // of --listen, which makes it or allows the program to ask for it
	app   netip.AddrPort
	now   route.Outer
	end   func()
	ended bool
}

// stays reports whether the program cannot end it.
func (u *udpPort) stays() bool { return u.of.Proto == portmap.UDP }

// keep keeps the mapping of app. The caller holds mu.
func (m *Manager) keep(of Spec, app netip.AddrPort) {
	of = m.named(of)
	u := &udpPort{spec: Spec{app.Port(), of.Upstream, portmap.UDP}, of: of, app: app}
	if m.udp == nil {
		m.udp = map[netip.AddrPort]*udpPort{}
	}
	m.udp[app] = u
	u.end = m.cfg.KeepUDP(app, u.spec.Upstream, func(o route.Outer) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if !u.ended && !m.over {
			m.reached(u, o)
		}
	})
}

// setUDP is Set for UDP: it ends what specs neither make nor allow. wanted is specs, with the names of their upstreams. The
// caller holds mu.
func (m *Manager) setUDP(specs []Spec, wanted map[Spec]bool) {
	if m.over {
		return
	}
	for _, u := range m.udp {
		if !u.of.Auto() && !wanted[u.of] {
			m.unkeep(u)
		}
	}
	for _, s := range specs {
		if s.Proto == portmap.UDP {
			m.keepListed(m.named(s))
		}
	}
}

// keepListed keeps the mapping of a port of --listen, which a program may have asked for already. The caller holds mu.
func (m *Manager) keepListed(s Spec) {
	app := m.cfg.App(s.Port)
	if u := m.udp[app]; u != nil {
		if u.spec.Upstream == s.Upstream {
			u.of = s
			return
		}
		m.unkeep(u)
	}
	m.keep(s, app)
}

// unkeep ends what keep began. The caller holds mu.
func (m *Manager) unkeep(u *udpPort) {
	u.ended = true
	delete(m.udp, u.app)
	u.end()
	m.follow(u, 0)
	m.announce(u.spec, u.now.At, netip.AddrPort{})
}

// reached handles news about where u is reached. The caller holds mu.
func (m *Manager) reached(u *udpPort, o route.Outer) {
	was := u.now
	u.now = o
	switch {
	case o.At.IsValid() && o.At != was.At:
		m.cfg.Log.Info("peers can send datagrams to the program", "port", u.spec.Port, "at", o.At, "upstream", u.spec.Upstream)
		m.follow(u, o.At.Port())
	case o.Err != nil:
		m.cfg.Log.Warn("it is not known where peers can send datagrams to the program", "port", u.spec.Port,
			"upstream", u.spec.Upstream, "err", o.Err)
	}
	if o.Filter == route.FilterClosed && was.Filter != o.Filter {
		m.cfg.Log.Info("the proxy lets only those send datagrams to the program to whom it has sent", "port", u.spec.Port,
			"upstream", u.spec.Upstream)
	}
	m.announce(u.spec, was.At, o.At)
}

// announce tells that a UDP port is reached at another place than before.
func (m *Manager) announce(s Spec, was, now netip.AddrPort) {
	if was != now && m.cfg.Announce != nil {
		m.cfg.Announce(s, now, netip.AddrPort{})
	}
}

// follow lets the server listen for the same port of TCP at the outer port of UDP, too, which cannot be chosen: peers expect one
// number for both. The port that the program has been told stays, because it has told it to trackers.
func (m *Manager) follow(u *udpPort, outer uint16) {
	if p := m.find(u.app.Port()); p != nil && p.spec.Upstream == u.spec.Upstream {
		p.wantAlso(outer)
	}
}

// sameAsUDP returns the outer port of UDP for a port of TCP that is asked for, or 0. The caller holds mu.
func (m *Manager) sameAsUDP(app netip.AddrPort, upstream string) uint16 {
	if u := m.udp[app]; u != nil && u.now.At.IsValid() && u.spec.Upstream == upstream {
		return u.now.At.Port()
	}
	return 0
}

// mapUDP is Map for UDP. The caller holds mu.
func (b *Mapper) mapUDP(app netip.AddrPort) (netip.AddrPort, portmap.State) {
	m := b.m
	u := m.udp[app]
	if u == nil {
		s, ok := b.allowsUDP(app.Port())
		switch {
		case m.cfg.KeepUDP == nil:
			return netip.AddrPort{}, portmap.Unsupported
		case !ok:
			return netip.AddrPort{}, portmap.Forbidden
		case m.over || len(m.udp) >= maxUDP:
			return netip.AddrPort{}, portmap.Full
		}
		m.keep(s, app)
		return netip.AddrPort{}, portmap.Wait
	}
	o := u.now
	switch {
	case o.At.IsValid() && m.cfg.CanBePeer(o.At.Addr()):
		return o.At, portmap.Works
	case o.At.IsValid(): // by loopback; peers use another address of the proxy
		at, state := b.external()
		if state == portmap.Wait {
			return netip.AddrPort{}, portmap.Wait
		}
		return netip.AddrPortFrom(at, o.At.Port()), portmap.Works
	case o.Err != nil && o.Cannot:
		return netip.AddrPort{}, portmap.Unsupported
	case o.Err != nil:
		return netip.AddrPort{}, portmap.Failed
	}
	return netip.AddrPort{}, portmap.Wait
}

// allowsUDP reports whether the user allows programs to ask for a UDP port, and by which upstream.
func (b *Mapper) allowsUDP(port uint16) (Spec, bool) {
	if p := b.m.find(port); p != nil && !p.asked {
		return p.spec, p.spec.Proto == 0
	}
	if b.auto == nil {
		return Spec{}, false
	}
	return *b.auto, true
}

// unmapUDP is Unmap for UDP. The caller holds mu.
func (b *Mapper) unmapUDP(app netip.AddrPort) {
	if u := b.m.udp[app]; u != nil && !u.stays() {
		b.m.unkeep(u)
	}
}
