package route

import (
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// Most rules look at protocol and destination alone, and the cache in verdict.go is for them. Where a rule also looks at
// the source, at names or at the owner of a socket, or where decisions are written, a verdict on datagrams is remembered
// for a pair of source and destination, and not for longer than what it depends on stays as it is.

// deepAge is how long a verdict is believed that depends on a name or on an owner: both change with time.
const deepAge = int64(time.Second)

// deepCache remembers verdicts on datagrams by source and destination. It belongs to who holds the mappings' lock.
type deepCache [cacheSize]deepSlot

type deepSlot struct {
	src, dst netip.AddrPort
	v        *verdict
	until    int64
	changes  uint64 // of the names, when the verdict was taken
}

// slot mixes both endpoints into the place of a pair.
func (c *deepCache) slot(src, dst netip.AddrPort) *deepSlot {
	return &c[(slotOf(dst)^slotOf(src)*5)&(cacheSize-1)]
}

// deepFor is the cache that a policy needs; nil: the plain one is right for it.
func (r *Router) deepFor(p *policy) *deepCache {
	if p.plain() && r.decisions == nil {
		return nil
	}
	return &deepCache{}
}

// wantsNames reports whether answers of DNS must be remembered.
func (r *Router) wantsNames() bool {
	return r.decisions != nil || r.policy.Load().needs&(ofName|ofList) != 0
}

// queryOf is what a verdict on a flow is taken on, as far as it is known. Names are looked up where somebody wants them.
func (r *Router) queryOf(f flow.Flow, dest Dest) query {
	q := query{proto: f.Proto, src: f.Src, dst: dest.Addr}
	switch {
	case dest.Name != "":
		q.names, q.fake = []string{plainName(dest.Name)}, true
	case dest.Sniffed != "":
		q.names = []string{dest.Sniffed}
	case r.wantsNames():
		q.names = r.names.of(dest.Addr.Addr(), r.now(), nil)
	}
	return q
}

// decideUDP takes the verdict on a datagram, and adds to q the owner that it was taken on; verdictAsk: the owner is looked for.
// udp.mu is held.
func (r *shard) decideUDP(q *query, p *flow.Packet, now int64) *verdict {
	v := r.verdictOn(q)
	switch {
	case r.asker == nil && v == verdictAsk: // nobody can tell
		q.owner = &nobody
		return r.verdictOn(q)
	case r.asker != nil && (v == verdictAsk || r.decisions != nil): // whose line names the program
		var asked bool
		if q.owner, asked = r.ownerOf(p, now); q.owner == nil && (asked || v == verdictAsk) {
			return verdictAsk
		}
		return r.verdictOn(q)
	}
	return v
}

// classifyDeep is classify where a verdict depends on more than the destination. udp.mu is held.
func (r *shard) classifyDeep(p *flow.Packet, now int64) *verdict {
	c := r.udp.deep.slot(p.Src, p.Dst)
	changes := r.names.changes.Load()
	same := c.v != nil && c.src == p.Src && c.dst == p.Dst
	if same && now < c.until && c.changes == changes {
		return c.v
	}
	f := flow.Flow{Proto: flow.UDP, Src: p.Src, Dst: p.Dst}
	q := r.queryOf(f, Dest{Addr: p.Dst})
	v := r.decideUDP(&q, p, now)
	if v == verdictAsk {
		return v
	}
	if !same || v != c.v {
		r.decisions.post(decision{time.Now(), f, q.names, v, q.owner})
	}
	*c = deepSlot{p.Src, p.Dst, v, now + deepAge, changes}
	return v
}
