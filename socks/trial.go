package socks

import (
	"time"
)

const (
	// While no server of a group works, each is tried again soonAgain after its last trial has ended. Such a trial
	// gives up after soonConnect, and when its data is not acknowledged within soonAck. A server that is back is thus
	// noticed within three seconds, whatever happened to the packets that were sent while it was away.
	soonAgain   = 500 * time.Millisecond
	soonConnect = 1500 * time.Millisecond
	soonAck     = 2 * time.Second
	// watchEvery is how often a server that carries associations is checked if nothing else was heard from it.
	watchEvery = 10 * time.Second
)

// looks are the checks of one server that are independent of the flows: the trial of a server that is out of use, and
// the check of one that is in use.
type looks struct {
	under bool          // one is in progress
	next  time.Duration // earliest time of the next one
}

// plan sets the timer for the next trial or check. The caller holds g.mu.
func (g *Group) plan() {
	if g.closed {
		return
	}
	now := g.d.now()
	first := time.Duration(-1)
	for i := range g.c.servers {
		if at, ok := g.lookAt(i); ok && (first < 0 || at < first) {
			first = at
		}
	}
	if g.timer != nil {
		g.timer.Stop()
		g.timer = nil
	}
	if first >= 0 {
		g.timer = time.AfterFunc(max(0, first-now), g.look)
	}
}

// lookAt returns when server i should be checked, or false if it need not be. The caller holds g.mu.
func (g *Group) lookAt(i int) (at time.Duration, ok bool) {
	h, l := &g.c.servers[i], &g.looks[i]
	switch every := g.c.opts.Check; {
	case l.under:
		return 0, false
	case h.isDown && len(g.clients) > 1 && g.c.allDown():
		return l.next, true
	case h.isDown && len(g.clients) > 1:
		return max(h.retryAt, l.next), true
	case every > 0:
		return max(h.answered+every, l.next), true
	case len(g.clients) > 1 && len(g.assocs[i]) > 0:
		return max(h.answered+watchEvery, l.next), true
	}
	return 0, false
}

// look begins the trials and checks that are due.
func (g *Group) look() {
	g.lock()
	defer g.unlock()
	if g.closed {
		return
	}
	now := g.d.now()
	soon := g.c.allDown() && len(g.clients) > 1
	for i := range g.c.servers {
		if at, ok := g.lookAt(i); !ok || at > now {
			continue
		}
		h := &g.c.servers[i]
		trial := len(g.clients) > 1 && h.due(now, soon)
		h.trying = trial
		g.looks[i].under = true
		g.clients[i].check(g.ctx, g.l, soon, func(err error) { g.looked(i, trial, err) })
	}
	g.plan()
}

// looked handles the result of a trial or check.
func (g *Group) looked(i int, trial bool, err error) {
	g.lock()
	h := &g.c.servers[i]
	now := g.d.now()
	said := h.why
	var o outcome
	switch {
	case trial:
		o.cameUp = h.tried(&g.c.opts, now, err)
	case err == nil:
		h.answered = now
		if len(g.clients) == 1 && h.isDown { // nothing else tries it
			o.cameUp = h.success(now)
		}
	default:
		o.wentDown = h.fault(&g.c.opts, now, err)
	}
	if o.wentDown {
		g.moveAssociations(i)
	}
	g.looks[i].under = false
	g.looks[i].next = now + soonAgain
	if g.c.opts.Check > 0 && !h.isDown && err == nil {
		g.looks[i].next = now + g.c.opts.Check
	}
	g.plan()
	g.unlock()
	g.tell(i, o, said, err)
}
