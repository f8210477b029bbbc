package conform

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// WriteText writes the report as text, one line for each thing that was tested.
func (r *Report) WriteText(w io.Writer) error {
	t := &text{w: w}
	t.line("server", r.Server)
	if !r.Reachable {
		t.line("reachable", "no: "+r.Error)
		return t.err
	}
	t.line("method", fmt.Sprintf("%s of none; %s of none and user", method(r.MethodOfNone), method(r.MethodOfBoth)))
	t.answer("open port", r.Open)
	t.answer("refused port", r.Refused)
	t.answer("no route", r.Unreachable)
	t.answer("silent target", r.Silent)
	t.answer("IPv6 target", r.IPv6)
	t.answer("name", r.Name)
	if r.Open.Works {
		t.line("FIN", fmt.Sprintf("%s up, %s down", r.HalfCloseUp, r.HalfCloseDown))
		t.line("RST", fmt.Sprintf("%s up, %s down", r.ResetUp, r.ResetDown))
		t.answer("BIND", r.Bind.First)
	}
	if r.Bind.First.Kind == Granted {
		t.answer("BIND, peer", r.Bind.Second)
	}
	t.udp(&r.UDP)
	t.answer("SOCKS4", r.SOCKS4)
	t.answer("SOCKS4a", r.SOCKS4a)
	return t.err
}

type text struct {
	w   io.Writer
	err error
}

func (t *text) line(what, value string) {
	if t.err == nil {
		_, t.err = fmt.Fprintf(t.w, "%-14s %s\n", what+":", value)
	}
}

func (t *text) answer(what string, a Answer) {
	if a.Kind == NotAsked {
		return
	}
	s := a.String()
	if a.Kind == Granted && !a.Works && !a.Early && a.Bound == "" {
		s += ", but nothing came back"
	}
	s += " after " + (time.Duration(a.After) * time.Millisecond).String()
	if a.Bound != "" {
		s += ", bound " + a.Bound
	}
	if a.Error != "" && a.Kind != Silence {
		s += ": " + a.Error
	}
	t.line(what, s)
}

func (t *text) udp(u *UDPReport) {
	t.answer("UDP", u.Associate)
	if u.Associate.Kind != Granted {
		return
	}
	if !u.Works {
		t.line("UDP echo", "no answer from the relay "+u.Relay)
		return
	}
	t.line("UDP mapping", string(u.Mapping))
	t.line("UDP filtering", string(u.Filtering))
	t.line("UDP size", fmt.Sprintf("%s up, %s down", size(u.LargestUp, u.CutUp), size(u.LargestDown, u.CutDown)))
	t.line("UDP sources", choose(u.TrueSource, "true", "not those that sent"))
	t.line("UDP to names", nameCell(*u)+choose(u.NameSource != "", " as the source of the answer", ""))
	t.line("UDP to IPv6", choose(u.IPv6, "yes", "no"))
	t.line("UDP ends", choose(u.EndsWithTCP, "with the control connection", "later than the control connection"))
	for _, why := range slices.Sorted(maps.Keys(u.After)) {
		t.line("UDP, "+why, string(u.After[why]))
	}
}

func choose(yes bool, a, b string) string {
	if yes {
		return a
	}
	return b
}

func size(whole, cut int) string {
	s := fmt.Sprint(whole)
	if cut > 0 {
		s += fmt.Sprintf(" (larger ones are cut to %d)", cut)
	}
	return s
}

func method(m int) string {
	switch m {
	case -1:
		return "no answer"
	case 0:
		return "none"
	case 2:
		return "user and password"
	case 0xff:
		return "nothing"
	}
	return fmt.Sprint("method ", m)
}

// yesNo returns the cell of a table for a thing that works or does not.
func yesNo(a Answer) string {
	if a.Kind == NotAsked {
		return "?"
	}
	return choose(a.Works, "yes", "no")
}

// cell is String in the shortest form.
func (a Answer) cell() string {
	switch a.Kind {
	case NotAsked:
		return "?"
	case Silence:
		return "none"
	case Granted:
		return choose(a.Early, "early", "yes")
	case Malformed, NoLogin, Failed:
		return "no"
	}
	return strings.Replace(a.String(), " (short)", "*", 1)
}

// bothWays returns the cell for what may pass up, down, or in both directions.
func bothWays(up, down Passage) string {
	switch {
	case up == Passed && down == Passed:
		return "both"
	case up == Passed:
		return "up"
	case down == Passed:
		return "down"
	case up == Unknown || up == "" || down == Unknown || down == "":
		return "?"
	}
	return "no"
}
