package route

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
)

// shard is the part of the Router that has the flows of one of the stack's shards: those of some of the app's ports.
// It owns their table, their mappings, the writers to the app, the relay loops and the counters. A flow stays on one
// loop of its shard from its SYN to its end, and no datagram needs anything that another shard's datagrams write to.
// For the order of its locks see the package's comment.
type shard struct {
	*Router // what all shards have in common
	index   int

	streams streams
	udp     mappings
	count   counters

	loops []*relay.Loop
	load  []atomic.Int64      // flows and associations of each loop
	loopW []flow.PacketWriter // for the loops

	readerW flow.PacketWriter // for the frame reader
	runW    flow.PacketWriter // for Run
	askW    flow.PacketWriter // for the asker
	dnsMu   sync.Mutex
	dnsW    flow.PacketWriter // for the holder of dnsMu
	dnsPkt  [1]flow.Packet
	burst   burst // under udp.mu

	rejectLogged int64 // guarded by udp.mu
}

// makeShards divides the loops among the shards. If there are fewer loops than shards, some shards share one.
func (r *Router) makeShards() error {
	n := r.cfg.Shards
	if n < 0 {
		return errors.New("cannot use a number of shards below 0")
	}
	n = max(n, 1)
	for i := range n {
		s := &shard{Router: r, index: i}
		for j := i; j < len(r.cfg.Loops); j += n {
			s.loops = append(s.loops, r.cfg.Loops[j])
		}
		if len(s.loops) == 0 {
			s.loops = append(s.loops, r.cfg.Loops[i%len(r.cfg.Loops)])
		}
		s.load, s.loopW = make([]atomic.Int64, len(s.loops)), make([]flow.PacketWriter, len(s.loops))
		s.udp.init(n)
		r.shards = append(r.shards, s)
	}
	return nil
}

// snapshot returns the existing TCP flows.
func (r *Router) snapshot() []*stream {
	var all []*stream
	for _, s := range r.shards {
		all = s.streams.appendTo(all)
	}
	return all
}

// share returns a shard's part of a limit.
func (r *Router) share(bound int) int { return bound / len(r.shards) }
