package daemon

import (
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/incoming"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// startListening lets peers behind the proxies connect to the program's ports (--listen), and tells programs of those that
// are forwarded (--forwarded-port), until end is called.
func startListening(cfg *config.Config, p *plane, environ []string, log *slog.Logger) (end func()) {
	if !cfg.Gateway() {
		return func() {}
	}
	c := incoming.Config{
		Loop: p.loops[0].Loop, Binder: p.binder, Default: cfg.Default, Deliver: p.deliver, CanBePeer: flow.CanBePeer, Log: log,
		NoIPv6: p.dial.noIPv6,
	}
	endHook := func() {}
	if cfg.OnPort != "" {
		h := incoming.NewHook(cfg.OnPort, programEnv(environ, true), log)
		c.Announce, endHook = h.Announce, h.Close
	}
	m := incoming.Start(c, cfg.Listen)
	p.incoming.Store(m)
	var auto *incoming.Spec
	if i := slices.IndexFunc(cfg.Listen, incoming.Spec.Auto); i >= 0 {
		auto = &cfg.Listen[i]
	}
	mapper := incoming.NewMapper(m, auto, cfg.Forwarded...)
	p.mapper.Store(mapper)
	endPorts := p.router.ServePorts(portmap.New(mapper, time.Now()))
	return func() {
		endPorts()
		m.Close()
		endHook()
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
	app := flow.TUN4
	if peer.Addr().Is6() {
		app = flow.TUN6
	}
	req := p.stack.Open(peer, netip.AddrPortFrom(app, s.Port))
	return p.router.Incoming(req, s.Upstream, "listen "+strconv.Itoa(int(s.Port)), sock, ended)
}

// ownPort reports whether peers reach a program at an endpoint.
func (p *plane) ownPort(at netip.AddrPort) bool { return p.incoming.Load().Holds(at) }

// fillListening adds the ports at which peers reach programs to status.
func (p *plane) fillListening(s *control.Status) {
	m := p.incoming.Load()
	if m == nil {
		return
	}
	c := m.Stats()
	s.Listening = &control.Listening{Accepted: c.Accepted, Refused: c.Refused, Bogus: c.Bogus}
	for _, port := range m.Ports() {
		l := control.ListeningPort{Port: port.Port, Upstream: port.Upstream, Open: port.Open, Why: port.Why}
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
