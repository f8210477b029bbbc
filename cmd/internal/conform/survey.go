package conform

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

//go:embed servers.json
var servers []byte

// Entry is one server of a Survey.
type Entry struct {
	Name    string  `json:"name"`
	Version string  `json:"version"`
	Report  *Report `json:"report"`
}

// Survey contains the results for several servers, in the order of their names.
type Survey struct {
	Servers []Entry `json:"servers"`
}

// Put adds e, or replaces the entry with the same name.
func (s *Survey) Put(e Entry) {
	i, found := slices.BinarySearchFunc(
		s.Servers,
		e.Name,
		func(a Entry, name string) int { return strings.Compare(a.Name, name) },
	)
	if found {
		s.Servers[i] = e
		return
	}
	s.Servers = slices.Insert(s.Servers, i, e)
}

// Date returns the day of the newest report.
func (s *Survey) Date() string {
	var newest time.Time
	for _, e := range s.Servers {
		if e.Report.Time.After(newest) {
			newest = e.Report.Time
		}
	}
	return newest.Format("2 January 2006")
}

// Servers returns the survey of real servers that `make zoo` last wrote.
func Servers() (*Survey, error) {
	var s Survey
	if err := json.Unmarshal(servers, &s); err != nil {
		return nil, fmt.Errorf("cannot read the survey of servers: %w", err)
	}
	return &s, nil
}

// TCPColumns and UDPColumns are the heads of the manual's two tables.
var (
	TCPColumns = []string{"server", "refused", "no route", "silent", "FIN", "RST", "BIND", "IPv6", "name", "v4", "v4a"}
	UDPColumns = []string{"server", "UDP", "mapping", "filter", "up", "down", "name", "IPv6", "unsendable"}
)

// TCPRow returns the row of e under TCPColumns.
func (e Entry) TCPRow() []string {
	r := e.Report
	return []string{
		e.Name, r.Refused.cell(), r.Unreachable.cell(), silent(r.Silent),
		bothWays(r.HalfCloseUp, r.HalfCloseDown), bothWays(r.ResetUp, r.ResetDown), bindCell(r.Bind),
		yesNo(r.IPv6), yesNo(r.Name), yesNo(r.SOCKS4), yesNo(r.SOCKS4a),
	}
}

// UDPRow returns the row of e under UDPColumns.
func (e Entry) UDPRow() []string {
	u := e.Report.UDP
	if !u.Works {
		return []string{e.Name, choose(u.Associate.Kind == Granted, "mute", "no"), "-", "-", "-", "-", "-", "-", "-"}
	}
	return []string{
		e.Name, "yes", natCell(u.Mapping), natCell(u.Filtering), sizeCell(u.LargestUp, u.CutUp),
		sizeCell(u.LargestDown, u.CutDown),
		nameCell(u), choose(u.IPv6, "yes", "no"), fateCell(u.After),
	}
}

// silent adds the seconds to a late answer.
func silent(a Answer) string {
	if a.Kind == Refused || a.Kind == Closed || a.Kind == Reset {
		return fmt.Sprintf("%s/%ds", a.cell(), (a.After+500)/1000)
	}
	return a.cell()
}

func bindCell(b BindReport) string {
	switch {
	case b.First.Kind != Granted:
		return "no"
	case b.Second.Works:
		return choose(b.Peer, "yes", "no peer")
	}
	return "first"
}

func natCell(n NAT) string {
	switch n {
	case EndpointIndependent:
		return "EI"
	case AddressDependent:
		return "AD"
	case PortDependent:
		return "APD"
	}
	return "?"
}

func sizeCell(whole, cut int) string { return fmt.Sprint(whole) + choose(cut > 0, "c", "") }

// nameCell returns the source of the answer to a datagram to a name, or "no" if there is none.
func nameCell(u UDPReport) string {
	switch {
	case !u.Names:
		return "no"
	case u.NameSource == "": // an older probe
		return "yes"
	}
	return string(u.NameSource)
}

// fateCell returns the worst result of a datagram that could not be sent.
func fateCell(after map[string]Fate) string {
	if len(after) == 0 {
		return "?"
	}
	for _, worst := range []Fate{Mute, Ended, NewPort} {
		var why []string
		for _, w := range slices.Sorted(maps.Keys(after)) {
			if after[w] == worst {
				why = append(why, w)
			}
		}
		if len(why) > 0 {
			return string(worst)
		}
	}
	return string(Survives)
}

// WriteMan writes the tables and the list of versions for the manual, in mdoc.
func (s *Survey) WriteMan(w io.Writer) error {
	b := new(strings.Builder)
	table(b, TCPColumns, s.Servers, Entry.TCPRow)
	fmt.Fprint(b, ".Pp\n")
	table(b, UDPColumns, s.Servers, Entry.UDPRow)
	fmt.Fprintf(b, ".Pp\nVersions, as of %s:\n", s.Date())
	for i, e := range s.Servers {
		fmt.Fprintf(b, "%s %s%s\n", e.Name, e.Version, choose(i == len(s.Servers)-1, ".", ","))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// table writes one table. Each column is as wide as its widest cell.
func table(b *strings.Builder, columns []string, entries []Entry, row func(Entry) []string) {
	wide := slices.Clone(columns)
	for _, e := range entries {
		for i, cell := range row(e) {
			if len(cell) > len(wide[i]) {
				wide[i] = cell
			}
		}
	}
	b.WriteString(".Bl -column -compact")
	for _, w := range wide {
		fmt.Fprintf(b, " %q", w)
	}
	fmt.Fprintf(b, "\n.It Sy %s\n", strings.Join(columns, " Ta Sy "))
	for _, e := range entries {
		fmt.Fprintf(b, ".It %s\n", strings.Join(row(e), " Ta "))
	}
	b.WriteString(".El\n")
}
