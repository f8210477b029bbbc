package socks

import (
	"net/netip"
	"time"
)

// A group is calm while nothing is known against any of its servers. A success then changes nothing but the time of
// the last answer. Flows on all loops therefore proceed without the group's lock. From the first fault or refusal
// until all servers are well again, they take the lock.

// lock takes g.mu and collects the answers that were noted without it.
func (g *Group) lock() {
	g.mu.Lock()
	for i := range g.heard {
		h := &g.c.servers[i]
		h.answered = max(h.answered, time.Duration(g.heard[i].Load()))
	}
}

// unlock records whether the group is calm and releases g.mu. It must follow each change of the servers' health.
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

// well reports whether nothing is known against the server.
func (h *health) well(now time.Duration) bool {
	for k := range h.unable {
		if !h.canDo(kind(k), now) {
			return false
		}
	}
	return !h.isDown && !h.probation && !h.trying && h.why == nil && len(h.faults) == 0 && h.noAnswers == 0 &&
		h.ended == quietRequests{} && h.silent == quietRequests{}
}

// beginCalm is chooser.begin without the lock. It is possible where the order of the servers never changes.
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

// grantedCalm records the success of an attempt without the lock. It returns false if the group is not calm, or if
// this flow changed that.
func (g *Group) grantedCalm(r *run) bool {
	if r.a.all != 1 || r.a.skipped || !g.calm.Load() {
		return false
	}
	g.heard[r.server].Store(int64(g.d.now()))
	return true
}
