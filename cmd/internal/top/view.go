package top

import (
	"fmt"
	"strings"

	"github.com/charmbracelet/x/ansi"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// The size of the smallest terminal into which the view fits.
const minWidth, minHeight = 50, 10

// The styles. They use the sixteen colours of the terminal; bubbletea removes them where the terminal has none.
var (
	bold   = ansi.Style{}.Bold()
	dim    = ansi.Style{}.Faint()
	good   = ansi.Style{}.ForegroundColor(ansi.Green)
	warn   = ansi.Style{}.ForegroundColor(ansi.Yellow)
	bad    = ansi.Style{}.Bold().ForegroundColor(ansi.Red)
	down   = ansi.Style{}.ForegroundColor(ansi.Cyan)
	up     = ansi.Style{}.ForegroundColor(ansi.Magenta)
	titles = ansi.Style{}.Reverse(true)
	none   = ansi.Style{}
)

// maxUpstreams is the maximum width of the table of upstreams. In a wider table, the columns would be too far apart to
// read.
const maxUpstreams = 120

// maxShownFilter limits how much of the filter is shown beside the keys.
const maxShownFilter = 16

// styled renders text in a style, or returns the text alone if there is none.
func styled(s ansi.Style, text string) string {
	if len(s) == 0 || text == "" {
		return text
	}
	return s.Styled(text)
}

// draw returns the whole view, with the height and width of the terminal.
func (m *model) draw() string {
	if m.width == 0 || m.height == 0 {
		return "" // the size is not known yet
	}
	if m.width < minWidth || m.height < minHeight {
		return fit(fmt.Sprintf("make the terminal %dx%d at least", minWidth, minHeight), m.width)
	}
	lines := m.head()
	if m.help {
		lines = append(lines, helpText...)
	} else {
		lines = append(lines, m.upstreamTable()...)
		lines = append(lines, "")
		lines = append(lines, m.flowTable(m.height-len(lines)-1)...)
	}
	lines = lines[:min(len(lines), m.height-1)]
	for len(lines) < m.height-1 {
		lines = append(lines, "")
	}
	lines = append(lines, m.foot())
	for i, l := range lines {
		lines[i] = ansi.Truncate(l, m.width, "…")
	}
	return strings.Join(lines, "\n")
}

// spread places left and right at the two ends of a line.
func spread(left, right string, width int) string {
	gap := width - ansi.StringWidth(left) - ansi.StringWidth(right)
	if gap < 1 {
		return ansi.Truncate(left, width, "…")
	}
	return left + strings.Repeat(" ", gap) + right
}

// head returns the lines about viasocks as a whole.
func (m *model) head() []string {
	s := m.last.status
	what := "up"
	if s.Mode == control.ModeRun {
		what = "run " + plain(s.Program)
	}
	if s.Mode == control.ModeAttach {
		what = "attach " + plain(s.Program)
	}
	state, style := plain(s.State), good
	switch {
	case m.gone != nil:
		state, style = "gone", bad
	case s.State != control.Ready:
		style = warn
	}
	left := " " + styled(bold, "viasocks "+what) + "  " + styled(style, state) +
		styled(dim, fmt.Sprintf("  process %d, for %s", s.PID, age(m.now.Sub(s.Since))))
	right := styled(dim, m.now.Format("15:04:05")) + " "
	if m.paused {
		right = styled(warn, "paused") + " "
	}
	lines := []string{
		spread(left, right, m.width),
		m.rateLine("down", down, m.down, s.Down),
		m.rateLine("up", up, m.up, s.Up),
		m.counts(),
	}
	switch {
	case m.gone != nil:
		lines = append(lines, " "+styled(bad, plain(m.gone.Error())+"; asking again, q quits"))
	case len(s.Warnings) > 1:
		lines = append(lines, " "+styled(warn, fmt.Sprintf("%d warnings, the first: %s", len(s.Warnings), plain(s.Warnings[0]))))
	case len(s.Warnings) == 1:
		lines = append(lines, " "+styled(warn, "warning: "+plain(s.Warnings[0])))
	}
	return append(lines, "")
}

// rateLine returns the current rate of one direction, its graph, and the total.
func (m *model) rateLine(name string, s ansi.Style, rates []float64, total uint64) string {
	left := fmt.Sprintf(" %-5s%s/s ", name, fitRight(size(current(rates)), 7))
	right := fmt.Sprintf(" %s total ", fitRight(size(float64(total)), 7))
	width := m.width - ansi.StringWidth(left) - ansi.StringWidth(right)
	return left + styled(s, graph(rates, width)) + right
}

// counts returns the line with the numbers of flows and names.
func (m *model) counts() string {
	s := m.last.status
	now := fmt.Sprintf("TCP %d", s.TCP.Now)
	if s.TCP.Pending > 0 {
		now += fmt.Sprintf(" (%d dialing)", s.TCP.Pending)
	}
	now += fmt.Sprintf(", UDP %d", s.UDP.Now)
	total := fmt.Sprintf("total TCP %s (%s refused), names %s", count(s.TCP.Total), count(s.TCP.Refused), count(s.Names.Asked))
	if s.Names.Failed > 0 {
		total += fmt.Sprintf(" (%s failed)", count(s.Names.Failed))
	}
	return " " + now + styled(dim, " · ") + total
}

// upstreamTable returns the upstreams and, as far as there is room, the servers of groups.
func (m *model) upstreamTable() []string {
	width := min(m.width, maxUpstreams)
	cols := columns{{"UPSTREAM", 10, false}, {"PROXY", 0, false}, {"TCP", 5, false}, {"UDP", 5, false}, {"FLOWS", 5, true},
		{"LATENCY", 8, true}, {"FAILED", 6, true}, {"DOWN/s", 7, true}, {"UP/s", 7, true}}
	cols[0].width = m.upstreamWidth(10, 12, 28)
	most := max(2, m.height/4)
	rows := []string{}
	for _, u := range m.upstreams {
		where := m.server(u.URL)
		switch {
		case u.URL == "":
			where = "no proxy"
		case u.Via != "":
			where += " via " + plain(u.Via)
		}
		rows = append(rows, cols.line(width, []cell{
			{plain(u.Name), none}, {where, dim}, healthCell(u.TCP), healthCell(u.UDP), {fmt.Sprint(u.flows), none},
			{latency(u.LatencyMS), none},
			{count(u.Failed), styleIf(u.Failed > 0, warn)}, {speed(u.downRate), down}, {speed(u.upRate), up},
		}))
		for _, x := range u.Servers {
			state := healthCell(x.State)
			line := strings.Repeat(" ", cols[0].width+4) + styled(dim, m.server(x.URL)) + " " + styled(state.style, state.text)
			if x.Why != "" {
				line += styled(dim, ": "+plain(reason(x)))
			}
			rows = append(rows, line)
		}
	}
	if len(rows) > most {
		hidden := len(rows) - most + 1
		rows = append(rows[:most-1], styled(dim, fmt.Sprintf(" … and %d more lines, see 'viasocks status'", hidden)))
	}
	return append([]string{cols.head(width, m.width, -1, false)}, rows...)
}

// upstreamWidth returns the width of a column for the names of upstreams: that of the longest, between least and most;
// wide is the most in a wide terminal.
func (m *model) upstreamWidth(least, most, wide int) int {
	if m.width >= wideWidth {
		most = wide
	}
	longest := 0
	for _, u := range m.upstreams {
		longest = max(longest, ansi.StringWidth(plain(u.Name)))
	}
	return min(max(longest, least), most)
}

// reason returns why a server is down. Its URL, which the error names as well, is beside it already.
func reason(x control.UpstreamServer) string {
	if _, why, ok := strings.Cut(x.Why, x.URL+": "); ok {
		return why
	}
	return x.Why
}

// server returns the URL of a proxy. In a narrow terminal, it omits the usual scheme.
func (m *model) server(url string) string {
	if m.width < wideWidth {
		url = strings.TrimPrefix(url, "socks5://")
	}
	return plain(url)
}

func healthCell(state string) cell {
	switch state {
	case control.UpstreamOK:
		return cell{state, good}
	case control.UpstreamNotTried:
		return cell{"-", dim} // nothing is known of it
	}
	return cell{plain(state), bad}
}

func styleIf(yes bool, s ansi.Style) ansi.Style {
	if yes {
		return s
	}
	return none
}

// foot returns the line of keys, or the filter while it is being typed.
func (m *model) foot() string {
	if m.typing {
		return " filter: " + m.filter + styled(ansi.Style{}.Reverse(true), " ") + styled(dim, "  enter keeps it, esc clears it")
	}
	direction := ""
	if m.reverse {
		direction = " reversed"
	}
	filter := "filter"
	if m.filter != "" {
		filter += ": " + ansi.Truncate(m.filter, maxShownFilter, "…")
	}
	keys := []struct{ key, what string }{
		{"q", "quit"}, {"?", "help"}, {"s", "sort: " + m.sort.String() + direction}, {"/", filter}, {"p", "pause"},
		{"r", "reverse"},
	}
	right := styled(dim, m.position()) + " "
	line := ""
	for _, k := range keys {
		next := " " + styled(bold, k.key) + styled(dim, " "+k.what) + " "
		if ansi.StringWidth(line)+ansi.StringWidth(next)+ansi.StringWidth(right) <= m.width { // the help shows all of them
			line += next
		}
	}
	return spread(line, right, m.width)
}

// position tells which flows are shown, and how many there are.
func (m *model) position() string {
	shown := len(m.chosen())
	all := m.last.flows.Total
	text := fmt.Sprintf("%d flows", all)
	if all == 1 {
		text = "1 flow"
	}
	if shown != all {
		text = fmt.Sprintf("%d of %s", shown, text)
	}
	return text
}

var helpText = []string{
	"  " + styled(bold, "s  right    ") + "sort by the next column: rate, total, age, program,",
	"              destination, upstream, state",
	"  " + styled(bold, "S  left     ") + "sort by the column before",
	"  " + styled(bold, "r           ") + "reverse the order",
	"  " + styled(bold, "/           ") + "show only flows that have all of the words that you type, in",
	"              any column; enter keeps the filter, esc clears it",
	"  " + styled(bold, "p  space    ") + "pause: what is shown stays as it is",
	"  " + styled(bold, "up down     ") + "move through the list; also page up, page down, home, end",
	"  " + styled(bold, "q  ctrl+c   ") + "quit",
	"",
	"  Rates are averages of the last second, in units of 1000 bytes. LATENCY is",
	"  the time until a connection is granted; FAILED counts connections that",
	"  failed through the fault of the proxy itself. What stands behind 'total'",
	"  counts from the start of viasocks; names are questions to DNS.",
	"  " + styled(dim, "Any key closes this help."),
}
