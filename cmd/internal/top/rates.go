package top

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// snapshot is an answer of viasocks with its time.
type snapshot struct {
	at     time.Time
	status control.Status
	flows  control.Flows
}

// row is a flow with its rates in bytes per second.
type row struct {
	control.Flow
	upRate, downRate float64
}

// upstream is an upstream with its flows and rates.
type upstream struct {
	control.Upstream
	flows            int
	upRate, downRate float64
}

// history is the number of seconds for which totals are kept: more than the widest graph shows.
const history = 300

// traffic combines the snapshots into rates.
type traffic struct {
	last      snapshot
	rows      []row
	upstreams []upstream
	up, down  []float64 // rates of all flows, the last one is the current one
}

// add adds a snapshot that is newer than the last one.
func (t *traffic) add(s snapshot) {
	seconds := s.at.Sub(t.last.at).Seconds()
	first := t.last.at.IsZero()
	if !first && s.status.PID != t.last.status.PID { // it is another viasocks now
		first = true
		t.up, t.down = nil, nil
	}
	before := map[uint64]control.Flow{}
	if !first {
		for _, f := range t.last.flows.Flows {
			before[f.ID] = f
		}
		t.up = appendRate(t.up, rate(t.last.status.Up, s.status.Up, seconds))
		t.down = appendRate(t.down, rate(t.last.status.Down, s.status.Down, seconds))
	}
	t.rows = t.rows[:0]
	for _, f := range s.flows.Flows {
		r := row{Flow: f}
		if !first {
			old := before[f.ID] // a new flow has moved all of its bytes since the last snapshot
			r.upRate, r.downRate = rate(old.Up, f.Up, seconds), rate(old.Down, f.Down, seconds)
		}
		t.rows = append(t.rows, r)
	}
	t.upstreams = t.upstreams[:0]
	for _, u := range s.status.Upstreams {
		x := upstream{Upstream: u}
		for _, r := range t.rows {
			if r.Upstream == u.Name {
				x.flows++
				x.upRate += r.upRate
				x.downRate += r.downRate
			}
		}
		t.upstreams = append(t.upstreams, x)
	}
	t.last = s
}

// rate returns bytes per second. A counter that went back gives zero.
func rate(before, now uint64, seconds float64) float64 {
	if now <= before || seconds <= 0 {
		return 0
	}
	return float64(now-before) / seconds
}

func appendRate(all []float64, r float64) []float64 {
	if all = append(all, r); len(all) > history {
		all = slices.Delete(all, 0, len(all)-history)
	}
	return all
}

// current returns the last rate, or 0 if none is known.
func current(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	return all[len(all)-1]
}

// order is the criterion by which flows are sorted.
type order int

const (
	byRate order = iota
	byTotal
	byAge
	byProgram
	byDestination
	byUpstream
	byState
	orders // their number
)

var orderNames = [orders]string{"rate", "total", "age", "program", "destination", "upstream", "state"}

func (o order) String() string { return orderNames[o] }

// compare sorts the more interesting flow first: the busiest, the youngest, or the first in the alphabet.
func (o order) compare(a, b row) int {
	c := 0
	switch o {
	case byRate:
		c = cmp.Compare(b.upRate+b.downRate, a.upRate+a.downRate)
		c = cmp.Or(c, cmp.Compare(b.Up+b.Down, a.Up+a.Down))
	case byTotal:
		c = cmp.Compare(b.Up+b.Down, a.Up+a.Down)
	case byAge:
		c = b.Start.Compare(a.Start)
	case byProgram:
		c = cmp.Or(strings.Compare(program(a.Flow), program(b.Flow)), cmp.Compare(a.PID, b.PID))
	case byDestination:
		c = strings.Compare(destination(a.Flow), destination(b.Flow))
	case byUpstream:
		c = strings.Compare(a.Upstream, b.Upstream)
	case byState:
		c = strings.Compare(a.State, b.State)
	}
	return cmp.Or(c, cmp.Compare(a.ID, b.ID))
}

// choose returns the rows that match the filter, sorted.
func choose(rows []row, filter string, by order, reverse bool) []row {
	words := strings.Fields(strings.ToLower(filter))
	var all []row
	for _, r := range rows {
		if r.matches(words) {
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b row) int {
		if reverse {
			a, b = b, a
		}
		return by.compare(a, b)
	})
	return all
}

// matches reports whether each of words (in lower case) occurs in one of the columns.
func (r *row) matches(words []string) bool {
	if len(words) == 0 {
		return true
	}
	text := strings.ToLower(strings.Join([]string{r.Proto, r.Src, r.Dst, r.Host, r.Exe, pidOf(r.Flow), r.Upstream, r.State,
		r.Rule}, " "))
	for _, w := range words {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}
