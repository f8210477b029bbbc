package route

import (
	"errors"
	"io"
	"maps"
	"net/netip"
	"slices"
	"syscall"

	"github.com/viasocks/viasocks/stack/flow"
)

// backTable maps the sources of datagrams to the fake destinations from which the app sees them. It never changes; a
// new table replaces it. The loops therefore read it without a lock.
type backTable struct {
	by    map[netip.AddrPort]*namedDest // by real address, or by the fake address, which stands for a name in a header
	waits []*namedDest                  // those whose name was sent to and whose answering address is unknown
}

// backNow returns a copy of m's table, which the caller changes and stores.
func (m *mapping) backNow() *backTable {
	next := &backTable{by: make(map[netip.AddrPort]*namedDest)}
	if have := m.back.Load(); have != nil {
		maps.Copy(next.by, have.by)
		next.waits = slices.Clone(have.waits)
	}
	return next
}

// bind makes datagrams from real appear to come from d. If several fake destinations have one real address, the last one
// counts. udp.mu is held.
func (m *mapping) bind(d *namedDest, real netip.AddrPort) {
	if _, itself := m.itself[real]; itself {
		return
	}
	if have := m.back.Load(); have != nil && have.by[real] == d {
		return
	}
	next := m.backNow()
	if len(next.by) >= 2*maxBound { // names whose addresses change all the time
		clear(next.by)
	}
	next.by[real] = d
	m.back.Store(next)
}

// await makes the first datagram from an unknown address with d's port count as d's answer, until the given time.
// udp.mu is held.
func (m *mapping) await(d *namedDest, until int64) {
	d.waits = until
	if have := m.back.Load(); have != nil && slices.Contains(have.waits, d) {
		return
	}
	next := m.backNow()
	next.waits = append(next.waits, d)
	m.back.Store(next)
}

// unwait ends await. udp.mu is held.
func (m *mapping) unwait(d *namedDest) {
	d.waits = 0
	have := m.back.Load()
	if have == nil || !slices.Contains(have.waits, d) {
		return
	}
	next := m.backNow()
	next.waits = slices.DeleteFunc(next.waits, func(o *namedDest) bool { return o == d })
	m.back.Store(next)
}

// waiting returns the destination for which a datagram from an unknown address with this port would count as the answer,
// or nil. udp.mu is held.
func (m *mapping) waiting(port uint16, now int64) *namedDest {
	have := m.back.Load()
	if have == nil {
		return nil
	}
	for _, d := range have.waits {
		if d.fake.Port() != port {
			continue
		}
		if now < d.waits {
			return d
		}
		m.unwait(d)
	}
	return nil
}

// waitsFor reports whether a datagram from an unknown address with this port may count as an answer.
func (t *backTable) waitsFor(port uint16) bool {
	for _, d := range t.waits {
		if d.fake.Port() == port {
			return true
		}
	}
	return false
}

// addressed records that the app writes to these addresses itself: their datagrams then keep their source. udp.mu is
// held.
func (r *shard) addressed(pkts []flow.Packet) {
	m := r.udp.bySrc[pkts[0].Src]
	if m == nil || m.back.Load() == nil {
		return
	}
	for i := range pkts {
		real, have := pkts[i].Dst, m.back.Load()
		_, bound := have.by[real]
		if !bound && !have.waitsFor(real.Port()) {
			continue
		}
		if m.itself == nil || len(m.itself) >= maxBound {
			m.itself = make(map[netip.AddrPort]struct{})
		}
		m.itself[real] = struct{}{}
		if bound {
			next := m.backNow()
			delete(next.by, real)
			m.back.Store(next)
		}
	}
}

// fakeOf returns the source of a datagram from src as the app sees it. a is the association that received it. It is
// called by loops.
func (r *shard) fakeOf(m *mapping, a *assoc, src netip.AddrPort, now int64) netip.AddrPort {
	back := m.back.Load()
	switch d := back.by[src]; {
	case d == nil && back.waitsFor(src.Port()):
		return r.recognise(m, a, src, now)
	case d == nil:
		return src
	case d.watch.Load():
		r.answered(m, a, d, src, now)
		return d.fake
	default:
		d.heard.Store(now)
		return d.fake
	}
}

// recognise decides whether an unknown source is the address of a name to which m has sent something. It must have the
// right port, within the time of await, and no program may have written to it by its address.
func (r *shard) recognise(m *mapping, a *assoc, src netip.AddrPort, now int64) netip.AddrPort {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	if d := m.back.Load().by[src]; d != nil { // another loop was faster
		return d.fake
	}
	d := m.waiting(src.Port(), now)
	if _, itself := m.itself[src]; d == nil || itself || m.gone.Load() || r.udp.writtenTo(m.src, src) {
		return src
	}
	// If the resolvers know the same address, it is certain.
	f := r.udp.far.byKey[d.farKey()]
	certain := f != nil && f.addr == src.Addr()
	if d.way == wayLearned {
		m.disown(d, src)
		if !certain {
			return src
		}
		d.disputed = false
		delete(m.itself, src)
	}
	m.await(d, now+int64(r.nameDoubt))
	if certain {
		m.unwait(d)
	}
	m.bind(d, src)
	d.way, d.real = wayLearned, src
	d.heard.Store(now)
	d.watch.Store(false)
	r.endTrial(d)
	a.namedAt = 0
	r.learnNames(a.up, a.names, func(t *nameTaking) { t.answered(d.name, certain) })
	return d.fake
}

// disown undoes that d's name has the address that it was learned to have: src answered as well, and one of them is a stranger.
// Both are strangers from now on, and d's address is no longer learned from answers. udp.mu is held.
func (m *mapping) disown(d *namedDest, src netip.AddrPort) {
	if m.itself == nil || len(m.itself) >= maxBound {
		m.itself = make(map[netip.AddrPort]struct{})
	}
	m.itself[d.real], m.itself[src] = struct{}{}, struct{}{}
	next := m.backNow()
	delete(next.by, d.real)
	m.back.Store(next)
	m.unwait(d)
	d.way, d.disputed = wayAsk, true
}

// answered records the first answer that d got after a change of its way.
func (r *shard) answered(m *mapping, a *assoc, d *namedDest, src netip.AddrPort, now int64) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	if m.gone.Load() || !d.watch.Swap(false) {
		return
	}
	d.heard.Store(now)
	switch {
	case src == d.fake: // the header had the name
		a.namedAt = 0
		m.unwait(d)
		r.learnNames(a.up, a.names, func(t *nameTaking) {
			t.asName.Store(true)
			t.answered(d.name, true)
		})
	case d.way == wayAsk: // by its address, after nothing had come by its name
		r.learnNames(a.up, a.names, func(t *nameTaking) { t.unanswered(d.name, r.now()) })
	}
	r.endTrial(d)
}

// endedOnName records that a's association ended with why, if something was sent to a name just before. udp.mu is held.
func (r *shard) endedOnName(a *assoc, why error) {
	at := a.namedAt
	a.namedAt = 0
	if at == 0 || r.now()-at > int64(r.nameSilence) || !errors.Is(why, io.EOF) && !errors.Is(why, syscall.ECONNRESET) {
		return
	}
	r.learnNames(a.up, a.names, func(t *nameTaking) { t.ended(a.namedTo, r.now()) })
}

// writtenTo reports whether a program has recently written to dst by its address. If verdicts are cached by source and
// destination, only app counts, and otherwise any program. udp.mu is held.
func (t *mappings) writtenTo(app, dst netip.AddrPort) bool {
	if t.deep != nil {
		c := t.deep.slot(app, dst)
		return c.v != nil && c.src == app && c.dst == dst
	}
	c := &t.cache[t.cache.slot(dst)]
	return c.v != nil && c.dst == dst
}
