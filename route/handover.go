package route

import "net/netip"

// UDPSources returns the endpoints of the app's sockets that have a mapping, or whose datagrams wait for their owner.
// While another process takes over, their datagrams still belong here. It may be called from any goroutine.
func (r *Router) UDPSources() (srcs []netip.AddrPort) {
	for _, s := range r.shards {
		s.udp.mu.Lock()
		for src := range s.udp.bySrc {
			srcs = append(srcs, src)
		}
		for src, o := range s.udp.owners.bySrc {
			if _, mapped := s.udp.bySrc[src]; !mapped && len(o.items) > 0 {
				srcs = append(srcs, src)
			}
		}
		s.udp.mu.Unlock()
	}
	return srcs
}
