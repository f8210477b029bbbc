package route

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/count"
)

// UpstreamCounters is the table of an upstream's counters; see package count.
type UpstreamCounters[T any] struct {
	Granted T `metric:"dials_total" label:"proto=tcp,outcome=granted" help:"Dials of upstreams; udp: of associations."`
	// The target, or the proxy, refused it.
	Refused T `metric:"dials_total" label:"proto=tcp,outcome=refused"`
	// No answer came, so the target is taken to be silent.
	Silent T `metric:"dials_total" label:"proto=tcp,outcome=silent"`
	// The proxy was not reached or did not work.
	Fault T `metric:"dials_total" label:"proto=tcp,outcome=server_fault"`
	// This host had no descriptors, ports or memory.
	Shortage T `metric:"dials_total" label:"proto=tcp,outcome=host_shortage"`
	// The program gave up, or the upstream is no longer configured.
	Cancelled T `metric:"dials_total" label:"proto=tcp,outcome=cancelled"`

	Associated          T `metric:"dials_total" label:"proto=udp,outcome=granted"`
	AssociationRefused  T `metric:"dials_total" label:"proto=udp,outcome=refused"`
	AssociationFault    T `metric:"dials_total" label:"proto=udp,outcome=server_fault"`
	AssociationShortage T `metric:"dials_total" label:"proto=udp,outcome=host_shortage"`

	Reassociations T `metric:"reassociations_total" help:"Associations that failed and were made again."`

	Up   T `metric:"upstream_bytes_total" label:"proto=tcp,direction=up" help:"Payload by upstream; up: from programs."`
	Down T `metric:"upstream_bytes_total" label:"proto=tcp,direction=down"`
}

// upstreamCounters are the counters of one upstream, for ended TCP flows and closed links.
type upstreamCounters struct {
	UpstreamCounters[atomic.Uint64]
	links relay.LinkCounters[atomic.Uint64]
}

// dialed counts the result of a dial for a TCP flow.
func (c *upstreamCounters) dialed(err error) {
	switch {
	case err == nil:
		c.Granted.Add(1)
	case isServerFault(err):
		c.Fault.Add(1)
	case errors.Is(err, context.Canceled), errors.Is(err, socks.ErrClosed), err == errReplaced, err == errClosing:
		c.Cancelled.Add(1)
	case isShortage(err):
		c.Shortage.Add(1)
	case errors.Is(err, socks.ErrSilent):
		c.Silent.Add(1)
	default:
		c.Refused.Add(1)
	}
}

// triedUDP reports whether the upstream was ever asked for an association, and answered or was at fault.
func (c *upstreamCounters) triedUDP() bool {
	return c.Associated.Load()+c.AssociationFault.Load()+c.AssociationRefused.Load() > 0
}

// associated counts the result of a dial for an association.
func (c *upstreamCounters) associated(err error) {
	switch {
	case err == nil:
		c.Associated.Add(1)
	case isServerFault(err):
		c.AssociationFault.Add(1)
	case isShortage(err):
		c.AssociationShortage.Add(1)
	default:
		c.AssociationRefused.Add(1)
	}
}

// UpstreamStats is what one upstream has carried since the start, including open flows.
type UpstreamStats struct {
	Name string
	UpstreamCounters[uint64]
	relay.LinkStats

	TCPDown int `metric:"upstream_down" label:"proto=tcp" help:"1 if the last dial met a fault of the server."`
	UDPDown int `metric:"upstream_down" label:"proto=udp"`
}

// UpstreamStats returns the numbers of each upstream, in the order of the configuration. It examines every flow. A
// flow that ends meanwhile may be missing; a later call includes it.
func (r *Router) UpstreamStats() []UpstreamStats {
	var all []UpstreamStats
	at := map[string]int{}
	for i, up := range slices.Concat(r.policy.Load().order, r.host.own()) {
		s := UpstreamStats{Name: up.name}
		count.Add(&s.UpstreamCounters, &up.count.UpstreamCounters)
		count.Add(&s.LinkStats, &up.count.links)
		if up.tcp.isDown() {
			s.TCPDown = 1
		}
		if up.udp.isDown() {
			s.UDPDown = 1
		}
		all, at[up.name] = append(all, s), i
	}
	for _, s := range r.snapshot() {
		rel := s.relay.Load()
		if i, ok := at[s.v.up.name]; ok && rel != nil && s.state.Load() == open {
			up, down := rel.Bytes()
			all[i].Up += up
			all[i].Down += down
		}
	}
	for _, s := range r.shards {
		for _, l := range s.openLinks() {
			if i, ok := at[l.up.name]; ok {
				st := l.link.Stats()
				st.Overflowed += l.link.Overflowed()
				count.Add(&all[i].LinkStats, &st)
			}
		}
	}
	return all
}

// openLink is a link with its upstream.
type openLink struct {
	up   *upstream
	link relay.PacketLink
}

func (r *shard) openLinks() (all []openLink) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	for _, m := range r.udp.all {
		for _, a := range m.assocs {
			if a.link != nil {
				all = append(all, openLink{a.up, a.link})
			}
		}
	}
	return all
}
