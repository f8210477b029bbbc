package socks

import (
	"net/netip"
	"time"
)

// A group is calm while nothing speaks against any of its servers: a success then changes nothing but the time of the last
// answer. So flows of all loops pass without the group's lock, which is taken from the first fault or refusal on until all is
// well again.

// lock takes g.mu and what was granted past it.
func (g *Group) lock() {
	g.mu.Lock()
	for i := range g.heard {
		h := &g.c.servers[i]
		h.answered = max(h.answered, time.Duration(g.heard[i].Load()))
	}
}

// unlock notes whether the group is calm, and gives g.mu back. It follows each change of the servers' health.
func (g *Group) unlock() {
	now, calm := g.d.now(), true
	for i := range g.c.servers {
		calm = calm && g.c.servers[i].well(now)
	}
	if calm != g.calm.Load() {
		g.calm.Store(calm)
	}
	g.mu.Unlock()
}

// well reports whether nothing is known that speaks against the server.
func (h *health) well(now time.Duration) bool {
	for k := range h.unable {
		if !h.canDo(kind(k), now) {
			return false
		}
	}
	return !h.isDown && !h.probation && !h.trying && h.why == nil && len(h.faults) == 0 && h.noAnswers == 0 &&
		h.ended == quietRequests{} && h.silent == quietRequests{}
}

// beginCalm is chooser.begin where that needs no lock: in an order that is always the same.
func (g *Group) beginCalm(a *attempt, cmd Command, src netip.Addr, dst Addr) bool {
	if s := g.c.opts.Select; s != Ordered && s != Hash {
		return false
	}
	g.c.begin(a, cmd, src, dst)
	return true
}

// nextCalm is chooser.next for the first attempt of a flow.
func (g *Group) nextCalm(a *attempt) (server int, ok bool) {
	if a.all != 0 || !g.calm.Load() {
		return 0, false
	}
	a.all, a.here, a.began = 1, 1, g.d.now()
	return int(a.order[0]), true
}

// grantedCalm is the success of an attempt. false: the group is not calm, or this flow has changed that.
func (g *Group) grantedCalm(r *run) bool {
	if r.a.all != 1 || r.a.skipped || !g.calm.Load() {
		return false
	}
	g.heard[r.server].Store(int64(g.d.now()))
	return true
}
