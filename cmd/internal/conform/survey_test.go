package conform

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

// The committed survey can be read, and each of its servers has something in every column of the manual's tables.
func TestServers(t *testing.T) {
	s, err := Servers()
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Servers) < 10 {
		t.Errorf("only %d servers", len(s.Servers))
	}
	if !slices.IsSortedFunc(s.Servers, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("the servers are not in the order of their names")
	}
	for _, e := range s.Servers {
		if e.Name == "" || e.Version == "" || e.Report == nil || e.Report.Time.IsZero() {
			t.Errorf("an entry lacks its name, version, report or time: %+v", e)
			continue
		}
		row(t, e.Name, TCPColumns, e.TCPRow())
		row(t, e.Name, UDPColumns, e.UDPRow())
	}
}

func row(t *testing.T, name string, columns, cells []string) {
	t.Helper()
	if len(cells) != len(columns) {
		t.Fatalf("%s: %d cells for %d columns", name, len(cells), len(columns))
	}
	for i, cell := range cells {
		if cell == "" || cell == "?" || strings.ContainsAny(cell, "\n\t\"\\") {
			t.Errorf("%s: %q in column %s", name, cell, columns[i])
		}
	}
}

func TestPutAndTables(t *testing.T) {
	var s Survey
	r := &Report{Refused: Answer{Kind: Refused, Code: 5, Short: true}, Silent: Answer{Kind: Refused, Code: 1, After: 5001},
		Unreachable: Answer{Kind: Closed}, HalfCloseUp: Passed, HalfCloseDown: CutOff, ResetUp: BecameFIN, ResetDown: Lost,
		UDP: UDPReport{Works: true, Mapping: EndpointIndependent, Filtering: PortDependent, LargestUp: 65497, LargestDown: 2038,
			CutDown: 2038, After: map[string]Fate{"port 0": Ended, "no route": Survives}}}
	for _, name := range []string{"c", "a", "b", "a"} {
		s.Put(Entry{name, "1", r})
	}
	if len(s.Servers) != 3 || s.Servers[0].Name != "a" || s.Servers[2].Name != "c" {
		t.Errorf("%+v", s.Servers)
	}
	if got := strings.Join(s.Servers[0].TCPRow(), " "); got != "a 5* FIN 1/5s up no no ? ? ? ?" {
		t.Error(got)
	}
	if got := strings.Join(s.Servers[0].UDPRow(), " "); got != "a yes EI APD 65497 2038c no no ends" {
		t.Error(got)
	}
	var b bytes.Buffer
	if err := s.WriteMan(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\n.It Sy server Ta Sy refused", "\n.It c Ta 5* Ta FIN Ta 1/5s", "b 1,\nc 1.\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
}
