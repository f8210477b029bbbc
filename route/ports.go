package route

import (
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/stack/flow"
)

var verdictPortMap = &verdict{kind: mapPort, rule: "portmap"}

// ServePorts lets s answer programs that ask for a port, until end is called. After that, it may be called again. It may be
// called from any goroutine. Searches by SSDP arrive only if the stack hands them over: see stack.Stack.SetSSDP.
func (r *Router) ServePorts(s *portmap.Server) (end func()) {
	u := newUPnP(s)
	r.portmap.Store(s)
	r.upnp.Store(u)
	return func() {
		r.portmap.CompareAndSwap(s, nil)
		r.upnp.CompareAndSwap(u, nil)
		u.close()
	}
}

// Ports returns what ServePorts set, or nil.
func (r *Router) Ports() *portmap.Server { return r.portmap.Load() }

// isPortMap reports whether a datagram is for answerPortMap. Multicast gets no further, because no proxy may carry it.
func (r *shard) isPortMap(dst netip.AddrPort) bool {
	switch dst.Port() {
	case portmap.Port:
		return (dst.Addr() == flow.Gateway4 || r.cfg.Asks != nil && flow.OneHost(dst.Addr())) && r.portmap.Load() != nil
	case portmap.SSDPPort:
		return dst == gatewayWeb && r.portmap.Load() != nil || dst == flow.SSDP
	}
	return false
}

// answerPortMap answers a request for a port. The caller holds udp.mu.
func (r *shard) answerPortMap(w flow.PacketWriter, p *flow.Packet) {
	s, src := r.portmap.Load(), p.Dst
	var b []byte
	switch {
	case s == nil, r.cfg.Asks != nil && !r.cfg.Asks(p.Src.Addr()):
	case src.Port() == portmap.Port:
		b = s.Handle(p.Payload, p.Src, time.Now())
	case p.Src.Addr().Is4():
		b, src = s.Search(p.Payload, gatewayWeb), gatewayWeb
	}
	if b != nil {
		one := [1]flow.Packet{{Src: src, Dst: p.Src, Payload: b}}
		_, _ = w.WritePackets(one[:])
	}
}

// sweepPorts ends the ports for which programs no longer ask.
func (r *Router) sweepPorts() {
	if s := r.portmap.Load(); s != nil {
		s.Expire(time.Now())
	}
}
