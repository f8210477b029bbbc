package hosttest

import (
	"fmt"
	"time"
)

// starting is a phase that begins open and must end closed: there is one shot from which on nothing leaves any more.
func (o *observer) starting(name string, event func()) {
	o.w.t.Helper()
	from := o.g.shots + 1
	c, seen := o.fire(name, 2, 1200*time.Millisecond, event)
	if c.skipped = o.w.notClosed(); c.skipped != "" {
		return
	}
	left := o.shotsSeen(seen)
	// The first shot that has a canary, should be seen, and was not, tells when it was closed.
	for n := from; n <= o.g.shots; n++ {
		p := o.g.probes[o.g.probed[n-1]]
		if !p.single || p.class != never || left[n] {
			continue
		}
		at := o.g.times[n-1]
		o.w.t.Logf("%s: closed at shot %d (%v) of %d", name, n-from+1, p, o.g.shots-from+1)
		var late []sighting
		for _, s := range seen {
			if s.shot > n || s.shot == 0 && s.at.After(at.Add(20*time.Millisecond)) {
				late = append(late, s)
			}
		}
		o.verdict(c, late)
		return
	}
	o.w.t.Errorf("%s: it was never closed", name)
}

// stopping is a phase that begins closed and ends open: there is one shot from which on everything leaves. What viasocks
// carried is over by then: its connections say nothing to their real peers.
func (o *observer) stopping(name string, event func()) {
	o.w.t.Helper()
	from := o.g.shots + 1
	c, seen := o.fire(name, 3, 1200*time.Millisecond, event)
	c.open = true
	left := o.shotsSeen(seen)
	var opened uint32
	for n := from; n <= o.g.shots; n++ {
		if p := o.g.probes[o.g.probed[n-1]]; p.single && p.class == never && left[n] {
			opened = n
			break
		}
	}
	if opened == 0 {
		o.w.t.Errorf("%s: it was never opened", name)
		return
	}
	o.w.t.Logf("%s: opened at shot %d of %d", name, opened-from+1, o.g.shots-from+1)
	var wrong []sighting
	for _, s := range seen {
		switch {
		case s.probe >= 0 && s.probe < len(o.g.probes) && o.g.probes[s.probe].class == carried:
			wrong = append(wrong, s)
		case s.probe == nobody && s.at.Before(o.g.times[opened-1]):
			wrong = append(wrong, s)
		default:
			c.allowed[o.row(s.probe)]++
		}
	}
	o.verdict(c, wrong)
	// In between it was neither open nor closed: nothing may be refused any more once something passed.
	missing := 0
	var which string
	for n := opened; n <= o.g.shots; n++ {
		if p := o.g.probes[o.g.probed[n-1]]; p.single && p.class == never && !left[n] && p.ns == "host" {
			missing++
			which = fmt.Sprint(p)
		}
	}
	if missing > 0 {
		o.w.t.Logf("%s: %d shots did not leave after the first that did, the last of %s", name, missing, which)
	}
}

// shotsSeen are the shots whose canary was seen.
func (o *observer) shotsSeen(seen []sighting) map[uint32]bool {
	m := map[uint32]bool{}
	for _, s := range seen {
		if s.shot != 0 {
			m[s.shot] = true
		}
	}
	return m
}

// merge adds the last column to the one before it, which has the same name.
func (o *observer) merge() {
	n := len(o.columns)
	if n < 2 || o.columns[n-2].name != o.columns[n-1].name {
		return
	}
	into, from := o.columns[n-2], o.columns[n-1]
	for _, m := range []struct{ into, from map[string]int }{{into.fired, from.fired}, {into.seen, from.seen},
		{into.allowed, from.allowed}} {
		for k, v := range m.from {
			m.into[k] += v
		}
	}
	o.columns = o.columns[:n-1]
}
