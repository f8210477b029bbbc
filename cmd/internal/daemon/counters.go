package daemon

import (
	"slices"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
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
}

func (p *plane) counters() counters {
	c := counters{Stack: p.stack.Stats(), Route: p.router.Stats(), Socks: p.dialer.Stats()}
	if p.dial.pool != nil {
		c.Pool = p.dial.pool.Stats()
	}
	return c
}

// all returns every number by its name.
func (c *counters) all() map[string]int64 {
	all := map[string]int64{}
	count.Each(*c, func(m count.Metric) { all[m.Key()] = int64(m.Value) })
	return all
}

// lost returns what could not be carried, in the order of the tables. Counters with the same text become one line.
func (c *counters) lost() (all []control.Counter) {
	count.Each(*c, func(m count.Metric) {
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
