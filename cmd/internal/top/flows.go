package top

import "github.com/viasocks/viasocks/cmd/internal/control"

const (
	// wideWidth is the width from which on there is room for process ids and both totals, and widerWidth for addresses
	// beside names as well.
	wideWidth  = 110
	widerWidth = 140
	// addressWidth is that of the column of addresses. It has room for IPv4 and a port; an IPv6 address loses its middle.
	addressWidth = 22
)

// flowColumn is one column of the table of flows.
type flowColumn struct {
	column
	from int                // the minimum width of the terminal at which it is shown
	to   int                // the maximum width; 0: none
	sort order              // the order that sorts by it; orders: none
	show func(*row) cell    // the content of a cell
	wide func(*column, int) // sets the width in a wide terminal; nil: it stays the same
}

func flowColumns(m *model) []flowColumn {
	text := func(f func(control.Flow) string) func(*row) cell {
		return func(r *row) cell { return cell{f(r.Flow), none} }
	}
	return []flowColumn{
		{column: column{"PROGRAM", 10, false}, sort: byProgram, show: text(program), wide: wider(16)},
		{column: column{"PID", 7, true}, from: wideWidth, sort: orders, show: text(pidOf)},
		{column: column{"PROTO", 5, false}, from: wideWidth, sort: orders,
			show: text(func(f control.Flow) string { return plain(f.Proto) })},
		{column: column{"DESTINATION", 0, false}, sort: byDestination, show: m.destinationCell},
		{column: column{"ADDRESS", addressWidth, false}, from: widerWidth, sort: orders, show: addressCell},
		{column: column{"VIA", m.upstreamWidth(5, 8, 16), false}, sort: byUpstream,
			show: text(func(f control.Flow) string { return plain(f.Upstream) })},
		{column: column{"STATE", 7, false}, sort: byState, show: m.stateCell, wide: wider(9)},
		{column: column{"DOWN/s", 7, true}, sort: byRate, show: func(r *row) cell { return cell{speed(r.downRate), down} }},
		{column: column{"UP/s", 7, true}, sort: orders, show: func(r *row) cell { return cell{speed(r.upRate), up} }},
		{column: column{"TOTAL", 7, true}, to: wideWidth, sort: byTotal,
			show: text(func(f control.Flow) string { return size(float64(f.Up + f.Down)) })},
		{column: column{"DOWN", 7, true}, from: wideWidth, sort: byTotal,
			show: text(func(f control.Flow) string { return size(float64(f.Down)) })},
		{column: column{"UP", 7, true}, from: wideWidth, sort: orders,
			show: text(func(f control.Flow) string { return size(float64(f.Up)) })},
		{column: column{"AGE", 5, true}, sort: byAge, show: func(r *row) cell { return cell{age(m.now.Sub(r.Start)), dim} }},
	}
}

func wider(width int) func(*column, int) { return func(c *column, _ int) { c.width = width } }

// destinationCell has the protocol before a destination that is not TCP, where there is no column for it.
func (m *model) destinationCell(r *row) cell {
	text := destination(r.Flow)
	if m.width < wideWidth && r.Proto != "tcp" {
		text = plain(r.Proto) + " " + text
	}
	return cell{text, none}
}

func (m *model) stateCell(r *row) cell {
	switch {
	case r.State == "open":
		return cell{r.State, none}
	case r.State == "retrying" && m.width < wideWidth: // the longest
		return cell{"retry", warn}
	}
	return cell{plain(r.State), warn}
}

// addressCell is the address of a destination that has a name. Without a name, the destination column already shows the
// address.
func addressCell(r *row) cell {
	if r.Host == "" {
		return cell{"", none}
	}
	return cell{fitName(plain(r.Dst), addressWidth), dim}
}

// chosen returns the flows that match the filter, sorted.
func (m *model) chosen() []row { return choose(m.rows, m.filter, m.sort, m.reverse) }

// flowTable returns the list of flows with the given number of lines, beginning at the row to which the user has
// scrolled.
func (m *model) flowTable(height int) []string {
	var cols columns
	var show []func(*row) cell
	sorted := -1
	for _, c := range flowColumns(m) {
		if m.width < c.from || c.to != 0 && m.width >= c.to || c.sort == byUpstream && len(m.upstreams) == 1 &&
			m.width < wideWidth {
			continue // there is no room, or all go the same way
		}
		if c.wide != nil && m.width >= wideWidth {
			c.wide(&c.column, m.width)
		}
		if c.sort == m.sort {
			sorted = len(cols)
		}
		cols, show = append(cols, c.column), append(show, c.show)
	}
	lines := []string{cols.head(m.width, m.width, sorted, m.reverse)}
	all := m.chosen()
	room := max(height-1, 1)
	m.offset = max(0, min(m.offset, len(all)-room))
	for i := range all[m.offset:min(len(all), m.offset+room)] {
		r := &all[m.offset+i]
		cells := make([]cell, len(show))
		for j := range show {
			cells[j] = show[j](r)
		}
		lines = append(lines, cols.line(m.width, cells))
	}
	switch {
	case len(all) > 0:
	case m.filter != "":
		lines = append(lines, styled(dim, " no flow matches the filter: esc clears it"))
	default:
		lines = append(lines, styled(dim, " there are no flows"))
	}
	return lines
}

// page is the number of rows by which page up and page down move.
func (m *model) page() int { return max(1, m.height/2) }
