package route

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// evictIdle is how long a mapping must be silent before a new one may replace it. Mappings with more recent traffic
// are in use, and a new one must wait.
const evictIdle = int64(5 * time.Second)

// newMapping makes a mapping, and makes room for it if necessary; nil: there is no room. host is the name of its first
// destination, if that is known.
func (r *shard) newMapping(v *verdict, p *flow.Packet, host string, now int64) *mapping {
	t := &r.udp
	if p.Src.Port() == 0 || !flow.OneHost(p.Src.Addr()) {
		return nil
	}
	if r.cfg.ComesBack != nil && r.cfg.ComesBack(flow.Flow{Proto: flow.UDP, Src: p.Src, Dst: p.Dst}) {
		return nil
	}
	if r.assocs.mappings.Add(1) > int64(t.most) && !r.makeRoom(now) {
		r.assocs.mappings.Add(-1)
		r.count.MappingsFull.Add(1)
		r.short(errMappingsFull)
		return nil
	}
	m := &mapping{s: r, src: p.Src, id: r.ids.Add(1), start: time.Now(), first: p.Dst, rule: v, host: host, oneShot: true}
	t.add(m)
	m.event(FlowOpened)
	r.count.Mappings.Add(1)
	return m
}

// makeRoom ends the mapping with the longest idle time, in whatever shard it is, except shards that are busy at the
// moment. It skips mappings that only receive, a few at a time. The caller holds udp.mu.
func (r *shard) makeRoom(now int64) bool {
	held := []*shard{r}
	for _, s := range r.shards {
		if s != r && s.udp.mu.TryLock() {
			held = append(held, s)
			defer s.udp.mu.Unlock()
		}
	}
	for range 16 {
		s := slices.MinFunc(held, func(a, b *shard) int { return cmp.Compare(a.udp.idleSince(), b.udp.idleSince()) })
		m := s.udp.oldest
		if m == nil || now-m.lastUp < evictIdle {
			return false
		}
		if m.kept != nil {
			m.lastUp = now
			s.udp.touch(m)
			continue
		}
		if now-m.lastDown.Load() >= evictIdle || m.lastDown.Load() == 0 {
			s.count.MappingsEvicted.Add(1)
			s.endMapping(m, "evicted", errEvicted)
			return true
		}
		m.lastUp = m.lastDown.Load()
		s.udp.touch(m)
	}
	return false
}

// askGone is the minimum time between two checks of the socket of an endpoint whose kernel reports port unreachable.
const askGone = int64(time.Second)

// handleUnreachable implements HandleUnreachable for one shard.
func (r *shard) handleUnreachable(endpoint netip.AddrPort) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	m := r.udp.bySrc[endpoint]
	switch now := r.now(); {
	case m == nil, m.kept != nil:
	case r.cfg.Sockets == nil:
		r.endMapping(m, "unreachable", errUnreachable)
	case now >= m.askedGone+askGone || m.askedGone == 0:
		m.askedGone = now
		r.inbox.post(event{kind: evUnreachable, m: m})
	}
}

// endMapping removes m from the table at once and leaves what may take longer to Run. The caller holds udp.mu.
func (r *shard) endMapping(m *mapping, state string, err error) {
	i := m.info()
	i.State = state
	r.udp.remove(m)
	r.assocs.mappings.Add(-1)
	for _, a := range m.assocs {
		r.discard(a)
	}
	m.assocs = nil
	for _, d := range m.named {
		r.endTrial(d)
		d.lease.Release()
	}
	r.count.Ended.Add(1)
	r.count.Up.Add(i.Up)
	r.count.Down.Add(i.Down)
	r.log.end(i, time.Since(m.start), err)
	r.watched.send(FlowClosed, i, err)
}

const (
	sweepEvery = time.Second
	sweepPart  = 8 // a sweep checks one of this many parts, but at least sweepMin
	sweepMin   = 64
)

// sweep checks a part of the mappings and ends those whose time is over.
func (r *shard) sweep() {
	t := &r.udp
	now := r.now()
	var old []*mapping
	var deaf []*assoc
	t.mu.Lock()
	for range min(max(sweepMin, len(t.all)/sweepPart), len(t.all)) {
		if t.walk >= len(t.all) {
			t.walk = 0
		}
		m := t.all[t.walk]
		t.walk++
		if now >= m.notYet && r.idle(m, now) {
			old = append(old, m)
		}
		for _, a := range m.assocs {
			if a.deafNow() {
				deaf = append(deaf, a)
			}
		}
	}
	for _, a := range deaf {
		r.refuseUDP(a, flow.RefusePort, errNobodyListens)
	}
	t.mu.Unlock()
	for _, m := range old {
		exists := r.exists(m)
		t.mu.Lock()
		switch {
		case m.gone.Load() || !r.idle(m, r.now()): // ended, or a datagram came during the query
		case exists:
			m.notYet = r.now() + int64(t.pinned)
		default:
			r.count.MappingsExpired.Add(1)
			r.endMapping(m, "closed", nil)
		}
		t.mu.Unlock()
	}
}

// exists asks whether the app has a socket with m's endpoint. It returns false if that cannot be queried.
func (b *base) exists(m *mapping) bool {
	if b.cfg.Sockets == nil {
		return false
	}
	ok, err := b.cfg.Sockets.Exists(flow.UDP, m.src, noAddr)
	return ok && err == nil
}

// unreachable ends m if its socket is gone, as the app's kernel reported.
func (r *shard) unreachable(m *mapping) {
	if r.exists(m) {
		return // it is connected, and another sender wrote to it
	}
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	if !m.gone.Load() && m.kept == nil {
		r.endMapping(m, "unreachable", errUnreachable)
	}
}

// idle reports whether m has been silent for its lifetime. The caller holds udp.mu.
func (r *shard) idle(m *mapping, now int64) bool {
	if m.kept != nil {
		return false
	}
	life := r.udp.life
	// An exchange of one datagram in each direction is also over, because no more is expected.
	if m.oneShot || m.upPkts == 1 && m.downPkts.Load() >= 1 {
		life = r.udp.shortLife
	}
	return now-m.lastSeen() >= int64(life)
}

// closeMappings ends all mappings and refuses new ones.
func (r *shard) closeMappings() {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	r.udp.clos = true
	for len(r.udp.all) > 0 {
		r.endMapping(r.udp.all[len(r.udp.all)-1], "closed", nil)
	}
}
