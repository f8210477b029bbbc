package route

import (
	"context"
	"net/netip"
	"strconv"
	"sync"

	"github.com/viasocks/viasocks/stack/flow"
)

// Rules with users, control groups and programs need the owner of the app's socket. Finding a program may require
// reading all of /proc, for which the frame reader must not wait. A flow whose verdict needs its owner therefore
// waits, as an unanswered SYN or as held datagrams, while a separate goroutine looks up the owners of all waiting
// flows. If no rule needs an owner, no flow waits.

const (
	// askQueue is how many flows may wait. A SYN over the limit is forgotten and retransmitted within a second, a
	// datagram is dropped.
	askQueue = 1024
	// askBatch is how many owners are looked up at a time.
	askBatch = 256
	// ownerAge is how long the owner of a UDP socket is valid: later the port may belong to another program.
	ownerAge = int64(1e9)
	// maxOwners limits the UDP sockets whose owner is stored.
	maxOwners = 1 << 13
	// heldAll limits the bytes of all held datagrams. Each shard has its share.
	heldAll = 4 << 20
)

// asker finds owners.
type asker struct {
	from flow.Owners
	in   chan waiting
	wg   sync.WaitGroup
}

// waiting is a flow that waits for its owner: a TCP flow with its request, or a UDP socket.
type waiting struct {
	s    *shard
	req  flow.StreamRequest
	flow flow.Flow
	dest Dest
}

func newAsker(from flow.Owners) *asker {
	if from == nil {
		return nil
	}
	return &asker{from: from, in: make(chan waiting, askQueue)}
}

// post queues a flow and reports whether there was room.
func (a *asker) post(w waiting) bool {
	select {
	case a.in <- w:
		return true
	default:
		return false
	}
}

// runAsker looks up owners until ctx ends, and then refuses the waiting streams. Later posts stay in the queue: their
// requests belong to a stack that is ending, too.
func (r *decider) runAsker(ctx context.Context) {
	batch := make([]waiting, 0, askBatch)
	for {
		batch = batch[:0]
		select {
		case <-ctx.Done():
			r.refuseWaiting()
			return
		case w := <-r.asker.in:
			batch = append(batch, w)
		}
		for more := true; more && len(batch) < askBatch; {
			select {
			case w := <-r.asker.in:
				batch = append(batch, w)
			default:
				more = false
			}
		}
		r.answerAll(batch)
		clear(batch)
	}
}

func (r *decider) refuseWaiting() {
	for {
		select {
		case w := <-r.asker.in:
			if w.req != nil {
				w.req.Reject(flow.RefuseReset)
			}
		default:
			return
		}
	}
}

func (r *decider) answerAll(batch []waiting) {
	flows, owners := make([]flow.Flow, len(batch)), make([]flow.Owner, len(batch))
	for i := range batch {
		flows[i] = batch[i].flow
	}
	r.asker.from.OwnersOf(flows, owners)
	for i, w := range batch {
		if w.req != nil {
			q := r.queryOf(w.flow, w.dest)
			q.owner = &owners[i]
			w.s.sniffOrTake(w.req, w.flow, w.dest, r.verdictOn(&q), &q)
		} else {
			w.s.release(w.flow.Src, owners[i])
		}
	}
}

// apart reports whether v's upstream separates programs.
func (v *verdict) apart() bool { return v.kind == carry && v.up.apart }

// programOf returns the key of o for an upstream that separates programs: the executable or, if that is not visible,
// the user. It is empty if the owner is unknown.
func programOf(o *flow.Owner) string {
	if o == nil || !o.Known {
		return ""
	}
	return strconv.FormatUint(uint64(o.UID), 10) + " " + o.Exe
}

// laterStream forgets a stream for which there is no room to wait. Its SYN will be retransmitted.
func (r *shard) laterStream(req flow.StreamRequest) {
	r.count.StreamsRefused.Add(1)
	r.count.AsksFull.Add(1)
	req.Reject(flow.RefuseLater)
}

// owned is what is known about the owner of a UDP socket, and the datagrams that wait for it. It is guarded by
// udp.mu.
type owned struct {
	owner flow.Owner
	at    int64 // when it was last found; 0: never
	asked bool  // a query is in progress
	items []queued
	bytes int
}

// owners is what is known about the owners of UDP sockets.
type owners struct {
	bySrc map[netip.AddrPort]*owned
	held  int // bytes
}

// ownerOf returns the owner of the socket that p came from, or nil if it is unknown; asked reports whether it is
// being looked up. The caller holds udp.mu.
func (r *shard) ownerOf(p *flow.Packet, now int64) (owner *flow.Owner, asked bool) {
	t := &r.udp.owners
	o := t.bySrc[p.Src]
	if o == nil {
		if t.bySrc == nil {
			t.bySrc = make(map[netip.AddrPort]*owned)
		}
		if len(t.bySrc) >= maxOwners && !t.makeRoom(now) {
			return nil, false
		}
		o = &owned{}
		t.bySrc[p.Src] = o
	}
	if !o.asked && (o.at == 0 || now-o.at >= ownerAge) {
		o.asked = r.asker.post(waiting{s: r, flow: flow.Flow{Proto: flow.UDP, Src: p.Src, Dst: p.Dst}})
	}
	if o.at == 0 {
		return nil, o.asked
	}
	return &o.owner, o.asked
}

// makeRoom drops owners that are not being looked up, and reports whether there were any.
func (t *owners) makeRoom(now int64) bool {
	for src, o := range t.bySrc {
		if !o.asked && now-o.at >= ownerAge {
			delete(t.bySrc, src)
		}
	}
	return len(t.bySrc) < maxOwners
}

// hold keeps datagrams of one source until their owner is known. The caller holds udp.mu.
func (r *shard) hold(pkts []flow.Packet, now int64) {
	t := &r.udp.owners
	o := t.bySrc[pkts[0].Src]
	for i := range pkts {
		p := &pkts[i]
		n := len(p.Head) + len(p.Payload)
		if o == nil || !o.asked || len(o.items) >= queueLen || o.bytes+n > queueBytes || t.held+n > r.share(heldAll) {
			r.count.QueueFull.Add(1)
			continue
		}
		buf := append(append(make([]byte, 0, n), p.Head...), p.Payload...)
		o.items = append(o.items, queued{p.Dst, buf, len(p.Head), now})
		o.bytes += n
		t.held += n
	}
}

// release stores the owner of a UDP socket, and sends what waited for it.
func (r *shard) release(src netip.AddrPort, owner flow.Owner) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	t := &r.udp.owners
	o := t.bySrc[src]
	if o == nil {
		return
	}
	now := r.now()
	o.owner, o.at, o.asked = owner, now, false
	items := o.items
	t.held -= o.bytes
	o.items, o.bytes = nil, 0
	if r.udp.clos {
		r.count.Dropped.Add(uint64(len(items)))
		return
	}
	for i := range items {
		pkt := [1]flow.Packet{items[i].packet(src)}
		v := r.classify(&pkt[0], now)
		v.hit(r.index, 1)
		r.run(r.askW, v, pkt[:], now)
	}
}
