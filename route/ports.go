package route

import (
	"time"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/stack/flow"
)

var verdictPortMap = &verdict{kind: mapPort, rule: "portmap"}

// ServePorts answers programs that ask flow.Gateway4 for a port by s. It may be called from any goroutine, once.
func (r *Router) ServePorts(s *portmap.Server) { r.portmap.Store(s) }

// Ports returns what ServePorts set, or nil.
func (r *Router) Ports() *portmap.Server { return r.portmap.Load() }

// answerPortMap answers a request for a port. The caller holds udp.mu.
func (r *shard) answerPortMap(w flow.PacketWriter, p *flow.Packet) {
	if b := r.portmap.Load().Handle(p.Payload, p.Src, time.Now()); b != nil {
		one := [1]flow.Packet{{Src: p.Dst, Dst: p.Src, Payload: b}}
		_, _ = w.WritePackets(one[:])
	}
}

// sweepPorts ends the ports for which programs no longer ask.
func (r *Router) sweepPorts() {
	if s := r.portmap.Load(); s != nil {
		s.Expire(time.Now())
	}
}
