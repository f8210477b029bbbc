package incoming

import (
	"slices"
	"time"
)

// lostLater asks after a pause for the ports that are missing, until the server listens there. If the server closed the
// connection first, its kernel keeps the port for a minute (TIME_WAIT).
func (p *port) lostLater() {
	if p.ended || p.lost != nil || len(p.missing()) == 0 {
		return
	}
	p.lostPause = min(max(2*p.lostPause, retryFirst), time.Minute)
	p.lost = time.AfterFunc(p.lostPause, func() {
		p.m.mu.Lock()
		p.lost = nil
		var missing []uint16
		if !p.ended && p.open+len(p.waiting)+p.asking < MaxOpen {
			missing = p.missing()
		}
		p.m.mu.Unlock()
		for _, outer := range missing {
			p.bind(outer)
		}
	})
}

// missing returns the outer ports that are wanted and at which the server does not listen, except for those that a connection
// of a peer uses: dante gives them only when it has ended.
func (p *port) missing() (outer []uint16) {
	for _, want := range []uint16{p.ask, p.also} {
		if want != 0 && !slices.Contains(outer, want) && !p.listens(want) && p.used[want] == 0 {
			outer = append(outer, want)
		}
	}
	return outer
}

// listens reports whether a BIND waits at an outer port.
func (p *port) listens(outer uint16) bool {
	for w := range p.waiting {
		if w.at.Port() == outer {
			return true
		}
	}
	return false
}

// wantAlso sets the outer port of UDP, 0 for none.
func (p *port) wantAlso(outer uint16) {
	if p.also == outer {
		return
	}
	for w := range p.waiting {
		if w.only == p.also && w.only != 0 && w.only != p.ask {
			w.cancel()
		}
	}
	p.also, p.lostPause = outer, 0
	if len(p.waiting) > 0 { // else the first BIND does it
		p.lostLater()
	}
	if p.six != nil {
		p.six.wantAlso(outer)
	}
}
