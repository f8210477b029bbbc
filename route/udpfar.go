package route

import (
	"context"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// The addresses of names that datagrams go to. They are looked up by the resolvers through the upstream that the rules
// choose, or on this host if the verdict is direct.

const (
	maxFar   = 4096             // names that are being looked up, or whose address is stored
	maxLater = 256              // datagrams that wait for their turn
	farWait  = 6 * time.Second  // route/dns has answered by then, or never
	farMin   = 10 * time.Second // the minimum time for which an address, or the lack of one, is valid
	farMax   = time.Hour
)

// farKey identifies a look-up.
type farKey struct {
	name       string
	v6, direct bool // direct: by this host's own resolver
}

// farAddr is the result of a look-up. It is guarded by udp.mu.
type farAddr struct {
	addr  netip.Addr // invalid: it has none
	until int64      // on the Router's clock; 0: never answered
	asked int64      // when the pending look-up began; 0: none is pending
	items []queuedFrom
	bytes int
}

// queuedFrom is a datagram that waits for an address, or for its turn.
type queuedFrom struct {
	queued
	src netip.AddrPort
}

// farTable contains the results for all names.
type farTable struct {
	byKey map[farKey]*farAddr
	held  int // bytes
	later int // datagrams that wait for their turn
}

// farAnswer is the answer to a look-up.
type farAnswer struct {
	s    *shard
	key  farKey
	addr netip.Addr
	ttl  time.Duration
}

// farState is the state of an address.
type farState uint8

const (
	farKnown farState = iota
	farNone           // there is none, or nobody can be asked
	farAsked          // a look-up is pending
	farFull           // no more names can be looked up now
)

// farKey returns the key of d's address.
func (d *namedDest) farKey() farKey {
	return farKey{d.name, d.fake.Addr().Is6(), d.v.up.name == DirectName}
}

// farOf returns the address of the name that d stands for, and begins a look-up if necessary. f is nil if state is
// farFull. udp.mu is held.
func (r *shard) farOf(d *namedDest, now int64) (f *farAddr, state farState) {
	t := &r.udp.far
	k := d.farKey()
	if f = t.byKey[k]; f == nil {
		if t.byKey == nil {
			t.byKey = make(map[farKey]*farAddr)
		}
		if len(t.byKey) >= maxFar && !t.makeRoom(now) {
			return nil, farFull
		}
		f = &farAddr{}
		t.byKey[k] = f
	}
	if now >= f.until && (f.asked == 0 || now-f.asked > int64(farWait)) {
		if f.asked = 0; r.lookUp(k, d.v.up) {
			f.asked = now
		}
	}
	switch {
	case f.addr.IsValid(): // a new answer may be pending
		return f, farKnown
	case f.asked == 0:
		return f, farNone
	}
	return f, farAsked
}

// holdFar keeps a datagram that came at at until the address is known. udp.mu is held.
func (r *shard) holdFar(f *farAddr, p *flow.Packet, at int64) {
	n := len(p.Head) + len(p.Payload)
	if len(f.items) >= queueLen || f.bytes+n > queueBytes || !r.udp.far.room(n, r.share(heldAll)) {
		r.count.QueueFull.Add(1)
		return
	}
	f.items = append(f.items, copyOf(p, at))
	f.bytes += n
}

// room reserves n bytes for a datagram that waits. It returns false if all waiting datagrams would then hold more than
// most bytes.
func (t *farTable) room(n, most int) bool {
	if t.held+n > most {
		return false
	}
	t.held += n
	return true
}

// copyOf returns a copy of a datagram that arrived at at.
func copyOf(p *flow.Packet, at int64) queuedFrom {
	buf := append(append(make([]byte, 0, len(p.Head)+len(p.Payload)), p.Head...), p.Payload...)
	return queuedFrom{queued{p.Dst, buf, len(p.Head), at}, p.Src}
}

// makeRoom drops expired results, and reports whether there were any.
func (t *farTable) makeRoom(now int64) bool {
	for k, f := range t.byKey {
		if now >= f.until && (f.asked == 0 || now-f.asked > int64(farWait)) {
			t.held -= f.bytes
			delete(t.byKey, k)
		}
	}
	return len(t.byKey) < maxFar
}

// lookUp asks for an address. Its answer arrives as an event. It returns false if nobody can be asked.
func (r *shard) lookUp(k farKey, up *upstream) bool {
	answer := func(a netip.Addr, ttl time.Duration) {
		r.inbox.post(event{kind: evFar, far: &farAnswer{r, k, a, ttl}})
	}
	if !k.direct {
		d := r.port53.server.Load()
		return d != nil && d.LookUp(k.name, k.v6, answer)
	}
	direct, ok := up.Upstream.(interface {
		LookUp(ctx context.Context, name string, done func([]netip.Addr, error))
	})
	if !ok {
		return false
	}
	direct.LookUp(r.ctx, k.name, func(all []netip.Addr, _ error) {
		for _, a := range all {
			if a.Is6() == k.v6 {
				answer(a, time.Minute)
				return
			}
		}
		answer(netip.Addr{}, 0)
	})
	return true
}

// found stores an answer, and sends what waited for it.
func (r *shard) found(a *farAnswer) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	t := &r.udp.far
	f := t.byKey[a.key]
	if f == nil {
		return
	}
	now := r.now()
	f.asked, f.until = 0, now+int64(min(max(a.ttl, farMin), farMax))
	f.addr = a.addr
	items := f.items
	t.held -= f.bytes
	f.items, f.bytes = nil, 0
	for i := range items {
		if r.udp.clos || now-items[i].at > int64(queueAge) {
			r.count.Dropped.Add(1)
			continue
		}
		p := items[i].packet(items[i].src)
		r.carryNamed(r.runW, &p, now, items[i].at)
	}
}

// turnAgain is the time between two checks whether it is a datagram's turn.
const turnAgain = 100 * time.Millisecond

// later handles a datagram that arrived at at once more after turnAgain. udp.mu is held.
func (r *shard) later(p *flow.Packet, at int64) {
	t := &r.udp.far
	if t.later >= maxLater || !t.room(len(p.Head)+len(p.Payload), r.share(heldAll)) {
		r.count.QueueFull.Add(1)
		return
	}
	t.later++
	q := copyOf(p, at)
	time.AfterFunc(turnAgain, func() { r.inbox.post(event{kind: evLater, later: &laterPacket{r, q}}) })
}

// laterPacket is a datagram that is handled once more.
type laterPacket struct {
	s *shard
	q queuedFrom
}

// carryLater handles a datagram that later has kept.
func (r *shard) carryLater(q *queuedFrom) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	t := &r.udp.far
	t.later--
	t.held -= len(q.buf)
	now := r.now()
	if r.udp.clos || now-q.at > int64(queueAge) {
		r.count.Dropped.Add(1)
		return
	}
	p := q.packet(q.src)
	r.carryNamed(r.runW, &p, now, q.at)
}
