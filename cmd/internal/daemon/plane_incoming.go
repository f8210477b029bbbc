package daemon

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/incoming"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// listening lets peers behind the proxies connect to programs (--listen), and tells programs of the ports that are
// forwarded (--forwarded-port).
type listening struct {
	environ []string // of the command of --on-port
	// inner returns the address of the program to which the connection of a peer is opened.
	inner func(peer netip.Addr) (netip.Addr, error)

	mu     sync.Mutex
	begun  bool
	closed bool
	cfg    *config.Config // that is in force
	end    func()         // nil: no port is there
}

// listen begins with it, until the plane ends. environ and inner are as in listening.
func (p *plane) listen(cfg *config.Config, environ []string, inner func(netip.Addr) (netip.Addr, error)) {
	p.environ, p.inner = environ, inner
	p.listening.mu.Lock()
	p.begun = true
	p.listening.mu.Unlock()
	p.relisten(cfg, nil)
}

// relisten takes another configuration. BINDs that stay are made again only if changed, when it is not nil, reports that
// their upstream has become another one.
func (p *plane) relisten(cfg *config.Config, changed func(upstream string) bool) {
	l := &p.listening
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.begun || l.closed {
		return
	}
	old := l.cfg
	l.cfg = cfg
	if l.end != nil && cfg.Gateway() && sameGateway(old, cfg) {
		m := p.incoming.Load()
		m.Set(cfg.Listen, cfg.Default)
		if changed != nil {
			m.Renew(changed)
		}
		return
	}
	p.endListening()
	if cfg.Gateway() {
		l.end = p.startListening(cfg)
	}
}

// sameGateway reports whether only ports of --listen differ.
func sameGateway(a, b *config.Config) bool {
	autoA, _ := a.AutoListen()
	autoB, _ := b.AutoListen()
	return autoA == autoB && a.OnPort == b.OnPort && a.Default == b.Default && slices.Equal(a.Forwarded, b.Forwarded)
}

// endListening ends what startListening began. The caller holds the lock.
func (p *plane) endListening() {
	if p.end != nil {
		p.end()
		p.end = nil
	}
}

// unlisten ends it for good. Open connections of peers go on.
func (p *plane) unlisten() {
	p.listening.mu.Lock()
	defer p.listening.mu.Unlock()
	p.closed = true
	p.endListening()
}

// startListening makes the BINDs and answers programs that ask for ports, until end is called.
func (p *plane) startListening(cfg *config.Config) (end func()) {
	c := incoming.Config{
		Loop: p.loops[0].Loop, Binder: p.binder, Default: cfg.Default, Deliver: p.deliver, CanBePeer: flow.CanBePeer, Log: p.log,
		NoIPv6:  p.dial.noIPv6,
		KeepUDP: p.keepUDP, App: appAt,
	}
	endHook := func() {}
	if cfg.OnPort != "" {
		h := incoming.NewHook(cfg.OnPort, programEnv(p.environ, true), p.log)
		c.Announce, endHook = h.Announce, h.Close
	}
	m := incoming.Start(c, cfg.Listen)
	var auto *incoming.Spec
	if s, ok := cfg.AutoListen(); ok {
		auto = &s
	}
	mapper := incoming.NewMapper(m, auto, cfg.Forwarded...)
	p.mapper.Store(mapper)
	p.incoming.Store(m)
	endPorts := p.router.ServePorts(portmap.New(mapper, time.Now()))
	return func() {
		endPorts()
		m.Close()
		endHook()
		p.incoming.Store(nil)
		p.mapper.Store(nil)
	}
}

// gatewayOf returns the gateway that programs can ask for ports, if there are any. Without that, programs find no gateway.
func gatewayOf(cfg *config.Config) (a netip.Addr) {
	if cfg.Gateway() {
		a = flow.Gateway4
	}
	return a
}

// binder returns the SOCKS servers of an upstream, or nil.
func (p *plane) binder(upstream string) incoming.Binder {
	if c := p.clients()[upstream]; c != nil {
		return c
	}
	return nil
}

// deliver opens the connection of a peer to the program, from the peer's own endpoint.
func (p *plane) deliver(s incoming.Spec, peer netip.AddrPort, sock loop.Socket, ended func(relay.Result)) error {
	app, err := p.inner(peer.Addr())
	if err != nil {
		sock.CloseReset()
		return err
	}
	req := p.stack.Open(peer, netip.AddrPortFrom(app, s.Port))
	return p.router.Incoming(req, s.Upstream, "listen "+strconv.Itoa(int(s.Port)), sock, ended)
}

// tunAddress is listening.inner for a program in a network of its own.
func tunAddress(peer netip.Addr) (netip.Addr, error) {
	if peer.Is6() {
		return flow.TUN6, nil
	}
	return flow.TUN4, nil
}

// asksOf returns route.Config.Asks. Under up, only programs of the host may ask for ports, and not containers: behind its
// address translation, they have that of the TUN.
func asksOf(cfg *config.Config) func(netip.Addr) bool {
	if cfg.Command != config.Up {
		return nil
	}
	return func(a netip.Addr) bool {
		all, err := net.InterfaceAddrs()
		return err == nil && !flow.IsOurs(a) && slices.ContainsFunc(all, func(n net.Addr) bool {
			p, err := netip.ParsePrefix(n.String())
			return err == nil && p.Addr() == a
		})
	}
}

// ownPort reports whether peers reach a program at an endpoint.
func (p *plane) ownPort(at netip.AddrPort) bool { return p.incoming.Load().Holds(at) }

// appAt returns where the program has a port.
func appAt(port uint16) netip.AddrPort { return netip.AddrPortFrom(flow.TUN4, port) }

// keepUDP keeps the mapping of a UDP port of the program.
func (p *plane) keepUDP(app netip.AddrPort, upstream string, tell func(route.Outer)) (end func()) {
	return p.router.KeepUDP(p.stack.Home(app.Port()), app, upstream, tell)
}

// fillListening adds the ports at which peers reach programs to status.
func (p *plane) fillListening(s *control.Status) {
	m := p.incoming.Load()
	if m == nil {
		return
	}
	c := m.Stats()
	s.Listening = &control.Listening{Accepted: c.Accepted, Refused: c.Refused, Bogus: c.Bogus}
	for _, port := range m.Ports() {
		l := control.ListeningPort{
			Port: port.Port, Proto: "tcp", Upstream: port.Upstream, Open: port.Open, Why: port.Why,
			Filtered: port.Filter == route.FilterClosed,
		}
		if port.Proto == portmap.UDP {
			l.Proto = "udp"
		}
		if port.Outer.IsValid() {
			l.Outer = port.Outer.String()
		}
		if l.Why6 = port.Why6; port.Outer6.IsValid() {
			l.Outer6 = port.Outer6.String()
		}
		s.Listening.Ports = append(s.Listening.Ports, l)
	}
	for _, f := range p.mapper.Load().Told() {
		t := control.ForwardedPort{Port: f.Port, Proto: "tcp", Inner: f.Inner}
		if f.Proto == portmap.UDP {
			t.Proto = "udp"
		}
		if f.Addr.IsValid() {
			t.Addr = f.Addr.String()
		}
		s.Listening.Forwarded = append(s.Listening.Forwarded, t)
	}
}
