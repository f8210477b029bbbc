package incoming

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/socks"
)

// probeAgain is how long a failed question for the proxy's address is not repeated.
const probeAgain = 10 * time.Second

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
		return netip.AddrPort{}, portmap.Unsupported
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
		b.m.add(Spec{Port: port, Upstream: b.auto.Upstream}, suggested)
		b.m.find(port).asked = true
		return netip.AddrPort{}, portmap.Wait
	case p.outer.IsValid():
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
	switch {
	case b.address.IsValid():
		return b.address, portmap.Works
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
	binder := b.m.cfg.Binder(up)
	if binder == nil {
		end(netip.Addr{}, errNoServer)
		return
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
	end(at, err)
}
