package hosttest

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// column is one phase of the table.
type column struct {
	name    string
	skipped string         // why it was not run
	open    bool           // packets are expected: the positive control
	fired   map[string]int // by row
	seen    map[string]int // frames that left the host and may not, by row
	allowed map[string]int // frames that may: open by design
}

// observer runs phases and keeps the table.
type observer struct {
	w       *world
	g       *gun
	rec     *recorder
	columns []*column
	strict  bool // AF_PACKET counts
	noLAN   bool // so does the private network
	used    bool // viasocks was up: what was established before was refused meanwhile
}

const otherRow = "(no probe's)"

// row is the table's row of a probe's number.
func (o *observer) row(id int) string {
	if id < 0 || id >= len(o.g.probes) {
		return otherRow
	}
	return o.g.probes[id].name
}

// fire runs event while probes are fired, then rounds of all probes and no less than d, and gives what was seen.
func (o *observer) fire(name string, rounds int64, d time.Duration, event func()) (*column, []sighting) {
	o.w.t.Helper()
	c := &column{name: name, fired: map[string]int{}, seen: map[string]int{}, allowed: map[string]int{}}
	o.columns = append(o.columns, c)
	o.g.phase.Add(1)
	before := make([]int64, len(o.g.probes))
	for i := range before {
		before[i] = o.g.fired[i].Load()
	}
	o.g.start()
	if event != nil {
		testkit.Pace(20 * time.Millisecond)
		event()
	}
	end := time.Now().Add(d)
	if err := o.g.rounds(rounds); err != nil {
		o.w.t.Error(err)
	}
	testkit.Pace(time.Until(end))
	if err := o.g.halt(); err != nil {
		o.w.t.Error(err)
	}
	testkit.Settle(100*time.Millisecond, "what leaves has left")
	for _, p := range o.g.probes {
		c.fired[p.name] += int(o.g.fired[p.id].Load() - before[p.id])
	}
	return c, o.rec.take()
}

// forbidden is whether a sighting is a leak while the host is closed.
func (o *observer) forbidden(s sighting) bool {
	if s.probe < 0 || s.probe >= len(o.g.probes) {
		return true
	}
	switch o.g.probes[s.probe].class {
	case strict:
		return o.strict
	case private:
		return o.noLAN
	}
	return true
}

// closed is a phase in which nothing may leave. It reports whether that was so.
func (o *observer) closed(name string, event func()) bool {
	o.w.t.Helper()
	return o.closedFor(name, 2, 0, event)
}

// closedFor is closed for at least d: so long that retransmissions are seen.
func (o *observer) closedFor(name string, rounds int64, d time.Duration, event func()) bool {
	o.w.t.Helper()
	c, seen := o.fire(name, rounds, d, event)
	return o.verdict(c, seen)
}

func (o *observer) verdict(c *column, seen []sighting) bool {
	o.w.t.Helper()
	var leaks []sighting
	for _, s := range seen {
		if !o.forbidden(s) {
			c.allowed[o.row(s.probe)]++
			continue
		}
		leaks = append(leaks, s)
	}
	return o.judge(c, leaks)
}

// judge reports frames that may not have left the host.
func (o *observer) judge(c *column, leaks []sighting) bool {
	o.w.t.Helper()
	if len(leaks) == 0 {
		return true
	}
	examples := map[string]string{}
	for _, s := range leaks {
		row := o.row(s.probe)
		c.seen[row]++
		examples[row] = s.what.String()
	}
	var lines []string
	for row, n := range c.seen {
		lines = append(lines, fmt.Sprintf("%s: %d (%s)", row, n, examples[row]))
	}
	o.w.t.Errorf("phase %q: %d frames left the host:\n\t%s", c.name, len(leaks), strings.Join(lines, "\n\t"))
	return false
}

// control is a phase in which each probe must be seen.
func (o *observer) control(name string) {
	o.w.t.Helper()
	c, seen := o.fire(name, 2, 0, nil)
	c.open = true
	byProbe := map[int]int{}
	for _, s := range seen {
		byProbe[s.probe]++
		c.seen[o.row(s.probe)]++
	}
	for _, p := range o.g.probes {
		if err := o.g.lastError(p); errors.Is(err, errUnavailable) {
			o.w.t.Logf("not tried: %v: %v", p, err)
			continue
		}
		if byProbe[p.id] == 0 && p.class != carried && !(p.old && o.used) {
			o.w.t.Errorf(
				"phase %q: %v was not seen: its test would prove nothing (the program saw: %v)",
				name,
				p,
				o.g.lastError(p),
			)
		}
	}
	for _, s := range seen {
		if s.probe == nobody {
			o.w.t.Logf("phase %q: no probe's: %v", name, s.what)
		}
	}
}

func (o *observer) skip(name, why string) {
	o.columns = append(o.columns, &column{name: name, skipped: why})
}

// table is phase x probe: frames seen, a dot for none, a blank where the probe was not fired, a plus before what is open
// by design.
func (o *observer) table() string {
	var b strings.Builder
	shown := o.columns[:0:0]
	for _, c := range o.columns {
		if c.skipped != "" {
			fmt.Fprintf(&b, "not run: %s: %s\n", c.name, c.skipped)
			continue
		}
		shown = append(shown, c)
	}
	for i, c := range shown {
		fmt.Fprintf(&b, "  %2d  %s\n", i+1, c.name)
	}
	var rows []string
	had := map[string]bool{}
	for _, p := range o.g.probes {
		if !had[p.name] {
			had[p.name] = true
			rows = append(rows, p.name)
		}
	}
	rows = append(rows, otherRow)
	fmt.Fprintf(&b, "%-36s", "frames outside, by phase")
	for i := range shown {
		fmt.Fprintf(&b, "%5d", i+1)
	}
	b.WriteString("\n")
	for _, row := range rows {
		fmt.Fprintf(&b, "%-36s", row)
		for _, c := range shown {
			switch {
			case c.fired[row] == 0 && c.seen[row] == 0 && row != otherRow:
				fmt.Fprintf(&b, "%5s", "")
			case c.allowed[row] > 0 && c.seen[row] == 0:
				fmt.Fprintf(&b, "%5s", fmt.Sprintf("+%d", c.allowed[row]))
			case c.seen[row] == 0:
				fmt.Fprintf(&b, "%5s", ".")
			default:
				fmt.Fprintf(&b, "%5d", c.seen[row])
			}
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "%-36s", "probes fired")
	for _, c := range shown {
		n := 0
		for _, f := range c.fired {
			n += f
		}
		fmt.Fprintf(&b, "%5d", n)
	}
	b.WriteString("\n")
	return b.String()
}
