package route

import (
	"errors"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// Run looks, in the background, for flows whose program is gone. The frames do not show this: a UDP socket closes
// silently, and the kernel silently drops a TCP connection without a socket if the far end does not accept the
// remaining data.

const (
	// lookEvery is how often Run lists the existing UDP sockets. It is one query for all mappings, and at least
	// lookShare times its duration passes before the next one, but no more than lookMost: a machine that stalls
	// during the query makes it seem expensive.
	lookEvery = 5 * time.Second
	lookShare = 200
	lookMost  = time.Minute
	// goneAfter is how long a mapping outlives its socket, so that a socket that is opened again on the same port
	// keeps the outer port.
	goneAfter = 10 * time.Second
	// streamsEvery is the time in which Run checks each TCP flow once.
	streamsEvery = 30 * time.Second
)

// goneSearch looks for flows whose program is gone. It belongs to Run.
type goneSearch struct {
	*base
	nextLook int64    // when the UDP sockets are listed again
	listed   boundSet // the sockets of the last list

	// Memory for each search.
	looked  []*mapping
	streams []*stream
}

// asking is what Run remembers about a mapping's socket. No other goroutine uses it.
type asking struct {
	done   bool  // the socket was looked up when the mapping was new
	known  bool  // "not found" means "gone", because the socket was found before or cannot be a guest's
	goneAt int64 // when it was first not found; 0: it existed at the last check
}

// found interprets the answer to a query for a socket, and reports whether the socket is certainly gone. known tells
// whether it was found before.
func found(ok bool, err error, known *bool) (gone bool) {
	switch {
	case ok:
		*known = true
		return false
	case err == nil:
		*known = true
		return true
	}
	return *known && errors.Is(err, flow.ErrForwarded)
}

// firstLook looks up the socket of a new mapping while it probably still exists.
func (g *goneSearch) firstLook(m *mapping) {
	if m.ask.done || g.cfg.Sockets == nil {
		return
	}
	m.ask.done = true
	ok, err := g.cfg.Sockets.Exists(flow.UDP, m.src, m.first)
	found(ok, err, &m.ask.known)
}

// boundSet contains the local endpoints of all UDP sockets.
type boundSet struct {
	ports     map[uint16]struct{} // of those bound to all addresses
	endpoints map[netip.AddrPort]struct{}
}

func (b *boundSet) reset() {
	if b.ports == nil || len(b.ports)+len(b.endpoints) > remake { // a map never shrinks
		b.ports, b.endpoints = map[uint16]struct{}{}, map[netip.AddrPort]struct{}{}
	}
	clear(b.ports)
	clear(b.endpoints)
}

func (b *boundSet) add(local netip.AddrPort) {
	if local.Addr().IsUnspecified() {
		b.ports[local.Port()] = struct{}{}
	} else {
		b.endpoints[local] = struct{}{}
	}
}

func (b *boundSet) has(src netip.AddrPort) bool {
	if _, ok := b.ports[src.Port()]; ok {
		return true
	}
	_, ok := b.endpoints[src]
	return ok
}

// sweepSockets lists the existing UDP sockets and ends the mappings whose socket has been gone long enough. It does
// not query single mappings, because the kernel has no index for that and searches its whole table of UDP sockets
// each time.
func (g *goneSearch) sweepSockets(shards []*shard) {
	now := g.now()
	if g.cfg.Sockets == nil || now < g.nextLook {
		return
	}
	g.nextLook = now + int64(g.lookEvery)
	all := g.looked[:0]
	for _, s := range shards {
		s.udp.mu.Lock()
		all = append(all, s.udp.all...)
		s.udp.mu.Unlock()
	}
	defer func() {
		clear(all)
		g.looked = all[:0]
	}()
	if len(all) == 0 {
		return
	}
	began := time.Now()
	due, err := g.missed(all, now)
	if err == nil && len(due) > 0 {
		err = g.endGone(due)
	}
	if err != nil {
		return
	}
	g.nextLook = now + int64(max(g.lookEvery, min(lookShare*time.Since(began), g.lookMost)))
}

// missed records which sockets exist, and returns the mappings whose socket has been gone long enough. It reuses the
// memory of all.
func (g *goneSearch) missed(all []*mapping, now int64) (due []*mapping, err error) {
	if err := g.list(); err != nil {
		return nil, err
	}
	due = all[:0]
	for _, m := range all {
		switch {
		case m.gone.Load():
		case g.listed.has(m.src):
			m.ask.known, m.ask.goneAt = true, 0
		case !m.ask.known:
		case m.ask.goneAt == 0:
			m.ask.goneAt = now
		case m.s.isDue(m, now):
			due = append(due, m)
		}
	}
	return due, nil
}

// list lists the existing UDP sockets.
func (g *goneSearch) list() error {
	g.listed.reset()
	return g.cfg.Sockets.BoundUDP(g.listed.add)
}

// isDue reports whether the socket of a mapping has been gone long enough.
func (r *shard) isDue(m *mapping, now int64) bool {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	m.ask.goneAt = max(m.ask.goneAt, m.lastUp) // a sender has a socket
	return m.kept == nil && now-m.ask.goneAt >= int64(r.goneAfter)
}

// endGone ends mappings whose socket was missing long enough and is missing in one more list: a socket can be left
// out of a list if others come and go meanwhile.
func (g *goneSearch) endGone(due []*mapping) error {
	if err := g.list(); err != nil {
		return err
	}
	for _, m := range due {
		if g.listed.has(m.src) {
			m.ask.goneAt = 0
			continue
		}
		m.s.endIfSilent(m)
	}
	return nil
}

// endIfSilent ends a mapping whose socket is gone, unless a new socket has sent from its port meanwhile.
func (r *shard) endIfSilent(m *mapping) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	if !m.gone.Load() && m.lastUp <= m.ask.goneAt && m.kept == nil {
		r.count.MappingsGone.Add(1)
		r.endMapping(m, "closed", nil)
	}
}

// look asks whether the app's socket exists, and reports whether it is certainly gone.
func (s *stream) look() (gone bool) {
	sockets := s.r.cfg.Sockets
	if sockets == nil {
		return false
	}
	known := s.known.Load()
	ok, err := sockets.Exists(flow.TCP, s.flow.Src, s.flow.Dst)
	gone = found(ok, err, &known)
	s.known.Store(known)
	return gone
}

// appendSome appends the next of parts parts, but at least sweepMin flows.
func (t *streams) appendSome(some []*stream, parts int) []*stream {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range min(max(sweepMin, len(t.all)/parts+1), len(t.all)) {
		if t.walk >= len(t.all) {
			t.walk = 0
		}
		some = append(some, t.all[t.walk])
		t.walk++
	}
	return some
}

// sweepStreams checks a part of the open TCP flows. If a flow makes no progress, it asks whether the app's socket
// still exists, and tells the relay if it does not. A program that only half-closed its connection still has its
// socket.
func (g *goneSearch) sweepStreams(shards []*shard) {
	if g.cfg.Sockets == nil {
		return
	}
	some := g.streams[:0]
	parts := max(1, int(g.streamsEvery/g.sweepEvery))
	for _, s := range shards {
		some = s.streams.appendSome(some, parts)
	}
	for _, s := range some {
		rel := s.relay.Load()
		if rel == nil {
			continue
		}
		up, down := rel.Bytes()
		if moved := up + down; moved != s.moved {
			s.moved = moved
			continue
		}
		if s.look() {
			if !s.orphaned {
				s.orphaned = true
				s.r.count.Orphans.Add(1)
			}
			rel.Orphaned()
		}
	}
	clear(some)
	g.streams = some[:0]
}
