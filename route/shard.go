package route

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
)

// shard is the part of the Router that has the flows of one of the stack's shards: those of some of the app's ports.
// It owns their table, their mappings, the writers to the app, the relay loops and the counters. A flow stays on one
// loop of its shard from its SYN to its end, and no datagram needs anything that another shard's datagrams write to.
//
// Lock order: reload before udp.mu of the shards, these by index, before streams.mu. A goroutine that holds one
// shard's udp.mu may only try to lock another's (makeRoom).
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
	ctlW    flow.PacketWriter // for Run
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

// Attach sets the function that makes writers to the apps of one shard, one for each goroutine that needs one. It
// must be called once, before Run and the first packet.
func (r *Router) Attach(writer func(shard int) flow.PacketWriter) {
	for i, s := range r.shards {
		s.readerW, s.ctlW, s.dnsW, s.askW = writer(i), writer(i), writer(i), writer(i)
		for j := range s.loopW {
			s.loopW[j] = writer(i)
		}
	}
}

// HandleStream implements stack.Handler. It makes the verdict and lets the upstream dial. It does not block.
func (r *Router) HandleStream(shard int, req flow.StreamRequest) { r.shards[shard].handleStream(req) }

// HandlePackets implements stack.Handler for a burst of datagrams of the apps of one shard. A run with one source and
// one upstream is sent by one call of its link. Nothing here blocks, and nothing is allocated for a datagram of an
// open association.
func (r *Router) HandlePackets(shard int, pkts []flow.Packet) { r.shards[shard].handlePackets(pkts) }

// HandleUnreachable implements stack.UnreachableHandler. It ends the mapping of an app endpoint whose kernel answered
// a datagram with ICMP port unreachable, because its socket is gone. A connected socket refuses datagrams of other
// senders in the same way, and these must not end its mapping; therefore Run checks the socket first if it can be
// queried. HandleUnreachable does not block.
func (r *Router) HandleUnreachable(shard int, app, _ netip.AddrPort) {
	r.shards[shard].handleUnreachable(app)
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
