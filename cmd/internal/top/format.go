package top

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/charmbracelet/x/ansi"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// plain makes text from outside safe to draw: it removes control sequences, and combining marks that pile up on one
// cell.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.In(r, unicode.Mn, unicode.Me) {
			return '?'
		}
		return r
	}, control.Plain(s))
}

// fit makes s exactly this many cells wide. Text that is too long loses its end.
func fit(s string, width int) string {
	if width <= 0 {
		return ""
	}
	if ansi.StringWidth(s) > width {
		s = ansi.Truncate(s, width, "…")
	}
	return s + strings.Repeat(" ", max(0, width-ansi.StringWidth(s)))
}

// fitRight is fit with the text aligned to the right.
func fitRight(s string, width int) string {
	s = strings.TrimRight(fit(s, width), " ")
	return strings.Repeat(" ", max(0, width-ansi.StringWidth(s))) + s
}

// fitName is fit for names. Both ends of a name matter, so one that is too long loses its middle.
func fitName(s string, width int) string {
	if n := ansi.StringWidth(s); n > width && width > 2 {
		head := (width - 1) / 2
		s = ansi.Truncate(s, head, "") + ansi.TruncateLeft(s, n-(width-1-head), "…")
	}
	return fit(s, width)
}

// size formats a number of bytes in at most six cells: 0, 512 B, 9.9 kB, 100 kB, 1.2 MB. The units are those of
// networks: 1000 bytes.
func size(n float64) string {
	if n < 1 {
		return "0"
	}
	if n < 1000 {
		return strconv.Itoa(int(n)) + " B"
	}
	for _, unit := range []string{"kB", "MB", "GB", "TB"} {
		n /= 1000
		switch {
		case n < 9.95:
			return fmt.Sprintf("%.1f %s", n, unit)
		case n < 999.5 || unit == "TB":
			return fmt.Sprintf("%.0f %s", n, unit)
		}
	}
	return ""
}

// speed formats a rate; zero is a dash.
func speed(perSecond float64) string {
	if perSecond < 1 {
		return nothing
	}
	return size(perSecond)
}

// age formats a duration in at most five cells, in one unit or two: 41s, 5m03, 2h07, 12d.
func age(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02d", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02d", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// latency formats the time until a connection is granted.
func latency(ms float64) string {
	switch {
	case ms <= 0:
		return nothing
	case ms < 9.95:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 9999.5:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.0f s", ms/1000)
}

// count formats a number in at most five cells.
func count(n uint64) string {
	if n < 100_000 {
		return strconv.FormatUint(n, 10)
	}
	return strings.ReplaceAll(strings.TrimSuffix(size(float64(n)), "B"), " ", "")
}

// bars are the eight heights of a column in a graph.
var bars = []rune("▁▂▃▄▅▆▇█")

// graph draws the last width values, scaled to the highest of them.
func graph(values []float64, width int) string {
	if width <= 0 {
		return ""
	}
	values = values[max(0, len(values)-width):]
	most := 0.0
	for _, v := range values {
		most = max(most, v)
	}
	var b strings.Builder
	b.WriteString(strings.Repeat(" ", width-len(values)))
	for _, v := range values {
		i := 0
		if most >= 1 {
			i = int(v / most * float64(len(bars)-1))
		}
		b.WriteRune(bars[min(max(i, 0), len(bars)-1)])
	}
	return b.String()
}

// program returns the name of a flow's program, or a dash if it is unknown.
func program(f control.Flow) string {
	switch {
	case f.Exe != "":
		return plain(strings.TrimSuffix(filepath.Base(f.Exe), " (deleted)"))
	case f.PID != 0:
		return pidOf(f)
	}
	return nothing
}

func pidOf(f control.Flow) string {
	if f.PID == 0 {
		return nothing
	}
	return strconv.Itoa(f.PID)
}

// destination returns the name and port of a flow's destination, or its address if it has no name.
func destination(f control.Flow) string {
	if f.Host == "" {
		return plain(f.Dst)
	}
	port := ""
	if i := strings.LastIndexByte(f.Dst, ':'); i >= 0 {
		port = f.Dst[i:]
	}
	return plain(f.Host + port)
}
