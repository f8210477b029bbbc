package route

import (
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// Most rules look only at protocol and destination, and the cache in verdict.go is for them. If a rule also looks at
// the source, at names or at the owner of a socket, or if decisions are written, a verdict on datagrams is cached for
// a pair of source and destination, and only while what it depends on does not change.

// deepAge is how long a verdict is valid that depends on a name or an owner, because both change with time.
const deepAge = int64(time.Second)

// deepCache caches verdicts on datagrams by source and destination. It is guarded by the mappings' lock.
type deepCache [cacheSize]deepSlot

type deepSlot struct {
	src, dst netip.AddrPort
	v        *verdict
	until    int64
	changes  uint64 // of the names, when the verdict was made
}

// slot returns the slot for a pair of endpoints.
func (c *deepCache) slot(src, dst netip.AddrPort) *deepSlot {
	return &c[(slotOf(dst)^slotOf(src)*5)&(cacheSize-1)]
}

// deepFor returns the cache that a policy needs, or nil if the plain cache is right for it.
func (r *decider) deepFor(p *policy) *deepCache {
	if p.plain() && r.decisions == nil {
		return nil
	}
	return &deepCache{}
}

// decideUDP returns the verdict on a datagram, and adds to q the owner on which it is based; verdictAsk means that
// the owner is being looked up. The caller holds udp.mu.
func (r *shard) decideUDP(q *query, p *flow.Packet, now int64) *verdict {
	v := r.verdictOn(q)
	switch {
	case r.asker == nil && v == verdictAsk: // the owner cannot be found
		q.owner = &nobody
		return r.verdictOn(q)
	case r.asker != nil && (v == verdictAsk || r.decisions != nil): // the decision line names the program
		var asked bool
		if q.owner, asked = r.ownerOf(p, now); q.owner == nil && (asked || v == verdictAsk) {
			return verdictAsk
		}
		return r.verdictOn(q)
	}
	return v
}

// classifyDeep is classify for verdicts that depend on more than the destination. The caller holds udp.mu.
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
