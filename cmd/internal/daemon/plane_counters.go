package daemon

import (
	"slices"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/incoming"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/count"
)

// counters is a snapshot of the counter tables of all parts of a data plane. A counter that is added to one of these
// tables is found here by its name, and thus appears in status and in the metrics.
type counters struct {
	Stack stack.Stats
	Route route.Stats
	Socks socks.Stats
	Pool  dns.PoolStats

	Incoming incoming.Counters[uint64]
	PortMap  portmap.Counters[uint64]

	ups []upstreamCounters
}

// upstreamCounters are the tables of one upstream. Its name becomes a label of each number.
type upstreamCounters struct {
	Route route.UpstreamStats
	Socks socks.Counters[uint64]
}

func (p *plane) counters() counters {
	c := counters{Stack: p.stack.Stats(), Route: p.router.Stats(), Socks: p.dialer.Stats(), Incoming: p.manager().Stats(),
		PortMap: p.router.Ports().Stats()}
	if p.dial.pool != nil {
		c.Pool = p.dial.pool.Stats()
	}
	clients := p.clients()
	for _, u := range p.router.UpstreamStats() {
		up := upstreamCounters{Route: u}
		if client := clients[u.Name]; client != nil {
			up.Socks = client.Counters()
		}
		c.ups = append(c.ups, up)
	}
	return c
}

// clients returns the SOCKS clients by the names of their upstreams.
func (p *plane) clients() map[string]*client {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := map[string]*client{}
	for _, u := range p.ups {
		if u.client != nil {
			all[u.Config.Name] = u.client
		}
	}
	return all
}

// each calls f for every number.
func (c *counters) each(f func(count.Metric)) {
	count.Each(*c, f)
	for _, u := range c.ups {
		count.Each(u, func(m count.Metric) {
			label := "upstream=" + u.Route.Name
			if m.Label != "" {
				label += "," + m.Label
			}
			m.Label = label
			f(m)
		})
	}
}

// all returns every number by its name. For a histogram, it is the number of durations.
func (c *counters) all() map[string]int64 {
	all := map[string]int64{}
	c.each(func(m count.Metric) {
		if m.Times != nil {
			m.Name += "_count"
			m.Value = float64(m.Times.Count())
		}
		all[m.Key()] = int64(m.Value)
	})
	return all
}

// lost returns what could not be carried, in the order of the tables. Counters with the same text become one line.
func (c *counters) lost() (all []control.Counter) {
	c.each(func(m count.Metric) {
		if m.Lost == "" || m.Value == 0 {
			return
		}
		i := slices.IndexFunc(all, func(have control.Counter) bool { return have.What == m.Lost })
		if i < 0 {
			i = len(all)
			all = append(all, control.Counter{What: m.Lost})
		}
		all[i].Packets += uint64(m.Value)
	})
	return all
}
