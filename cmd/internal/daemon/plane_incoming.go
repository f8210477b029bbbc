package daemon

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
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

// listening lets peers beyond the proxies reach programs (--listen), and tells programs which ports are forwarded to them
// (--forwarded-port).
type listening struct {
	environ []string // the environment of the command of --on-port
	// inner returns the address of the program to which the connection of a peer is opened.
	inner func(peer netip.Addr) (netip.Addr, error)
	// ports is nil while programs have no gateway that they can ask for ports. Any goroutine may read it.
	ports atomic.Pointer[ports]

	mu     sync.Mutex // guards the fields below
	begun  bool
	closed bool
	cfg    *config.Config // the configuration in force
	end    func()         // ends ports; nil: there are none
}

// ports are the ports at which peers reach programs, and the answers to programs that ask for them. They begin and end
// together.
type ports struct {
	manager *incoming.Manager
	mapper  *incoming.Mapper
}

// manager returns the Manager of the ports, or nil.
func (l *listening) manager() *incoming.Manager {
	if all := l.ports.Load(); all != nil {
		return all.manager
	}
	return nil
}

// listen makes the ports of --listen reachable until unlisten or Close is called. environ and inner are as in listening. It is
// called once.
func (p *plane) listen(cfg *config.Config, environ []string, inner func(netip.Addr) (netip.Addr, error)) {
	l := &p.listening
	l.environ, l.inner = environ, inner
	l.mu.Lock()
	l.begun = true
	l.mu.Unlock()
	p.relisten(cfg, nil)
}

// relisten adopts another configuration. A BIND that cfg still wants is made again only if changed is not nil and reports
// that its upstream has other servers now.
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
		m := l.manager()
		m.Set(cfg.Listen, cfg.Default)
		if changed != nil {
			m.Renew(changed)
		}
		return
	}
	l.endPorts()
	if cfg.Gateway() {
		l.end = p.startListening(cfg)
	}
}

// sameGateway reports whether two configurations differ at most in the ports of --listen.
func sameGateway(a, b *config.Config) bool {
	autoA, _ := a.AutoListen()
	autoB, _ := b.AutoListen()
	return autoA == autoB && a.OnPort == b.OnPort && a.Default == b.Default && slices.Equal(a.Forwarded, b.Forwarded)
}

// endPorts ends what startListening began. The caller holds l.mu.
func (l *listening) endPorts() {
	if l.end != nil {
		l.end()
		l.end = nil
	}
}

// unlisten ends the ports, and nothing makes them again. Open connections of peers go on. It may be called twice.
func (p *plane) unlisten() {
	l := &p.listening
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.endPorts()
}

// startListening makes the BINDs and answers programs that ask for ports, until end is called. The caller holds the lock of
// listening.
func (p *plane) startListening(cfg *config.Config) (end func()) {
	c := incoming.Config{
		Loop: p.loops[0].Loop, Binder: p.binder, Default: cfg.Default, Deliver: p.deliver, CanBePeer: flow.CanBePeer,
		NoIPv6: p.dial.noIPv6, KeepUDP: p.keepUDP, App: appAt, Log: p.log,
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
	p.ports.Store(&ports{m, mapper})
	endPorts := p.router.ServePorts(portmap.New(mapper, time.Now()))
	return func() {
		endPorts()
		m.Close()
		endHook()
		p.ports.Store(nil)
	}
}

// gatewayOf returns the address of the gateway that programs can ask for ports. It is invalid if they shall find none.
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

// deliver opens the connection of a peer to the program, from the peer's own endpoint. It is incoming.Config.Deliver.
func (p *plane) deliver(s incoming.Spec, peer netip.AddrPort, sock loop.Socket, ended func(relay.Result)) error {
	app, err := p.inner(peer.Addr())
	if err != nil {
		sock.CloseReset()
		return err
	}
	req := p.stack.Open(peer, netip.AddrPortFrom(app, s.Port))
	return p.router.Incoming(req, s.Upstream, "listen "+strconv.Itoa(int(s.Port)), sock, ended)
}

// tunAddress is listening.inner for a program that has a network of its own.
func tunAddress(peer netip.Addr) (netip.Addr, error) {
	if peer.Is6() {
		return flow.TUN6, nil
	}
	return flow.TUN4, nil
}

// asksOf returns route.Config.Asks. With `up`, only programs of the host may ask for ports. The requests of containers are
// refused. They come from an address of the TUN if the host translates addresses, and from one that the host does not have
// otherwise.
func asksOf(cfg *config.Config) func(netip.Addr) bool {
	if cfg.Command != config.Up {
		return nil
	}
	h := &hostAddresses{read: net.InterfaceAddrs}
	return func(a netip.Addr) bool { return !flow.IsOurs(a) && h.has(a, time.Now()) }
}

// ownPort reports whether peers reach a program at an endpoint of a proxy. It is route.Config.OwnPort.
func (p *plane) ownPort(at netip.AddrPort) bool { return p.manager().Holds(at) }

// appAt returns the endpoint of a program that listens at a port. It is incoming.Config.App.
func appAt(port uint16) netip.AddrPort { return netip.AddrPortFrom(flow.TUN4, port) }

// keepUDP keeps the mapping of a UDP port of the program. It is incoming.Config.KeepUDP.
func (p *plane) keepUDP(app netip.AddrPort, upstream string, tell func(route.Outer)) (end func()) {
	return p.router.KeepUDP(p.stack.Home(app.Port()), app, upstream, tell)
}

// fillListening adds the ports at which peers reach programs to the status. Any goroutine may call it.
func (p *plane) fillListening(s *control.Status) {
	all := p.ports.Load()
	if all == nil {
		return
	}
	m := all.manager
	c := m.Stats()
	s.Listening = &control.Listening{Accepted: c.Accepted, Refused: c.Refused, Bogus: c.Bogus}
	for _, port := range m.Ports() {
		l := control.ListeningPort{
			Port: port.Port, Proto: port.Proto.String(), Upstream: port.Upstream, Open: port.Open, Why: port.Why,
			Filtered: port.Filter == route.FilterClosed,
		}
		if port.Outer.IsValid() {
			l.Outer = port.Outer.String()
		}
		if l.Why6 = port.Why6; port.Outer6.IsValid() {
			l.Outer6 = port.Outer6.String()
		}
		s.Listening.Ports = append(s.Listening.Ports, l)
	}
	for _, f := range all.mapper.Told() {
		t := control.ForwardedPort{Port: f.Port, Proto: f.Proto.String(), Inner: f.Inner}
		if f.Addr.IsValid() {
			t.Addr = f.Addr.String()
		}
		s.Listening.Forwarded = append(s.Listening.Forwarded, t)
	}
}
