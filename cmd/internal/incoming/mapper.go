package incoming

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/socks"
)

// probeAgain is how long a failed question for the proxy's address is not repeated.
const probeAgain = 10 * time.Second

const (
	// probePort is the program's port whose outer address is asked for by UDP: discard.
	probePort = 9
	// probeUDPWait is how long the answer may take.
	probeUDPWait = 6 * time.Second
)

// Mapper makes the ports that programs ask their gateway for. It implements portmap.Backend.
type Mapper struct {
	m    *Manager
	auto *Spec // any port may be asked for, by its upstream; nil: only those of --listen

	// The fields below are guarded by m.mu.
	address netip.Addr // of the proxy toward peers
	asking  bool
	failed  portmap.State // Failed or Unsupported, if the last question for address failed
	since   time.Time     // when it failed

	forwarded []Told
}

var _ portmap.Backend = (*Mapper)(nil)

// NewMapper returns the Mapper for the ports of m. auto is the Spec of --listen auto, or nil.
func NewMapper(m *Manager, auto *Spec, forwarded ...Forwarded) *Mapper {
	b := &Mapper{m: m, forwarded: toldOf(forwarded)}
	if auto != nil {
		s := *auto
		if s.Upstream == "" {
			s.Upstream = m.cfg.Default
		}
		b.auto = &s
	}
	return b
}

// Map implements portmap.Backend.
func (b *Mapper) Map(w portmap.Want) (netip.AddrPort, portmap.State) {
	proto, port, suggested := w.Proto, w.App.Port(), w.Outer
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	p := b.m.find(port)
	if proto != portmap.TCP || p == nil { // for a port that has BINDs they are the better way
		if at, state, ok := b.forward(proto, port); ok {
			return at, state
		}
	}
	if proto != portmap.TCP {
		return b.mapUDP(w.App)
	}
	switch {
	case p == nil && b.auto == nil:
		return netip.AddrPort{}, portmap.Forbidden
	case p == nil && (b.m.over || len(b.m.ports) >= maxPorts):
		return netip.AddrPort{}, portmap.Full
	case p == nil:
		if suggested == 0 {
			suggested = port
		}
		if suggested == port && !w.Fixed { // another one is what the program had before, and has announced
			suggested = cmp.Or(b.m.sameAsUDP(w.App, b.auto.Upstream), port)
		}
		b.m.add(Spec{Port: port, Upstream: b.auto.Upstream}, suggested)
		b.m.find(port).asked = true
		return netip.AddrPort{}, portmap.Wait
	case p.outer.IsValid():
		if p.asked && !p.told { // this one stays, even if the server has the other one later
			p.told, p.ask = true, p.outer.Port()
		}
		return p.outer, portmap.Works
	case p.why != nil:
		return netip.AddrPort{}, stateOf(p.why)
	}
	return netip.AddrPort{}, portmap.Wait
}

// stateOf tells a program why its port cannot be reached.
func stateOf(err error) portmap.State {
	var reply socks.Reply
	if errors.As(err, &reply) && reply == socks.ReplyCommandNotSupported || err == errNoServer {
		return portmap.Unsupported
	}
	return portmap.Failed
}

// Unmap implements portmap.Backend. The ports of --listen stay.
func (b *Mapper) Unmap(proto portmap.Proto, app netip.AddrPort) {
	port := app.Port()
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	b.unforward(proto, port)
	if proto == portmap.UDP {
		b.unmapUDP(app)
	}
	if p := b.m.find(port); proto == portmap.TCP && p != nil && p.asked {
		b.m.remove(port)
	}
}

// External implements portmap.Backend. Without a port that peers can reach, it makes a BIND only to learn the address.
func (b *Mapper) External() (netip.Addr, portmap.State) {
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	return b.external()
}

func (b *Mapper) external() (netip.Addr, portmap.State) {
	for _, f := range b.forwarded {
		if f.Addr.IsValid() {
			return f.Addr, portmap.Works
		}
	}
	for _, p := range b.m.ports {
		if p.outer.IsValid() {
			b.address = p.outer.Addr()
			return b.address, portmap.Works
		}
	}
	if b.address.IsValid() {
		return b.address, portmap.Works
	}
	for _, u := range b.m.udp {
		if at := u.now.At.Addr(); b.m.cfg.CanBePeer(at) {
			return at, portmap.Works
		}
	}
	switch {
	case b.asking, b.m.over:
		return netip.Addr{}, portmap.Wait
	case b.failed != portmap.Wait && time.Since(b.since) < probeAgain:
		return netip.Addr{}, b.failed
	}
	b.asking = true
	b.m.busy.Go(b.probe)
	return netip.Addr{}, portmap.Wait
}

// probe asks for a port that nobody is told, and gives it up.
func (b *Mapper) probe() {
	b.m.mu.Lock()
	up := b.m.cfg.Default
	b.m.mu.Unlock()
	if b.auto != nil {
		up = b.auto.Upstream
	}
	end := func(at netip.Addr, err error) {
		b.m.mu.Lock()
		defer b.m.mu.Unlock()
		b.asking, b.address, b.failed = false, at, portmap.Wait
		if err != nil {
			b.failed, b.since = stateOf(err), time.Now()
		}
	}
	at, err := b.probeTCP(up)
	if err != nil && b.auto != nil && b.m.cfg.KeepUDP != nil {
		if other := b.probeUDP(up); other.IsValid() {
			at, err = other, nil
		}
	}
	end(at, err)
}

// probeUDP asks by UDP, for a port at which no program listens. It returns an invalid address if that fails.
func (b *Mapper) probeUDP(up string) (at netip.Addr) {
	found := make(chan netip.Addr, 1)
	end := b.m.cfg.KeepUDP(b.m.cfg.App(probePort), up, func(o route.Outer) {
		if o.Err == nil && !o.At.IsValid() {
			return
		}
		select {
		case found <- o.At.Addr():
		default:
		}
	})
	defer end()
	late := time.NewTimer(probeUDPWait)
	defer late.Stop()
	select {
	case at = <-found:
	case <-late.C:
	case <-b.m.ctx.Done():
	}
	if !b.m.cfg.CanBePeer(at) {
		return netip.Addr{}
	}
	return at
}

// probeTCP asks by a BIND, for any port.
func (b *Mapper) probeTCP(up string) (netip.Addr, error) {
	binder := b.m.cfg.Binder(up)
	if binder == nil {
		return netip.Addr{}, errNoServer
	}
	ctx, cancel := context.WithCancel(b.m.ctx)
	var at netip.Addr
	over := make(chan error, 1)
	binder.Bind(ctx, b.m.cfg.Loop, socks.Addr{IP: netip.IPv4Unspecified()}, bindWait,
		func(a netip.AddrPort) { at = a.Addr(); cancel() },
		func(fd int, _ netip.AddrPort, err error) {
			if fd >= 0 {
				closeReset(fd)
			}
			over <- err
		})
	err := <-over
	cancel()
	if at.IsValid() {
		err = nil
	}
	return at, err
}
