package main

import (
	"net/netip"
	"strings"
	"testing"
)

// Each connection of a crowd goes to another address of the network that the far end answers for.
func TestCrowdAddresses(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		l := &loader{target: netip.MustParseAddrPort("203.0.113.2:9000"), crowd: &crowd{v6: v6}}
		in := crowd4
		if v6 {
			in = crowd6
		}
		seen := map[netip.AddrPort]bool{}
		for range 60000 {
			a := l.to()
			if seen[a] || !in.Contains(a.Addr()) || a.Port() != crowdPort {
				t.Fatalf("address %d of the crowd is %v", len(seen), a)
			}
			seen[a] = true
		}
	}
	l := &loader{target: netip.MustParseAddrPort("203.0.113.2:9000")}
	if a := l.to(); a != l.target {
		t.Errorf("without a crowd a connection goes to %v", a)
	}
}

// The second table compares the rounds of two builds pair by pair, and is there only if two were measured.
func TestTable(t *testing.T) {
	const native = `{"mode":"native","round":1,"case":"conn1","value":1000,"unit":"conn/s","p50_us":10,"work":100}` + "\n"
	const this = `{"mode":"through","round":1,"case":"conn1","value":500,"unit":"conn/s","p50_us":20,"work":100,"cpu_s":0.01,"rss":1048576}
{"mode":"through","round":2,"case":"conn1","value":50,"unit":"conn/s","p50_us":200,"work":100,"cpu_s":0.1,"rss":1048576}
`
	const other = `{"mode":"against","round":1,"case":"conn1","value":250,"unit":"conn/s","p50_us":80,"work":100,"cpu_s":0.1,"rss":2097152}
{"mode":"against","round":2,"case":"conn1","value":25,"unit":"conn/s","p50_us":800,"work":100,"cpu_s":1,"rss":2097152}
`
	rows := func(in string) (rows [][]string) {
		var out strings.Builder
		if err := table(strings.NewReader(in), &out); err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(out.String()) {
			if f := strings.Fields(l); len(f) > 0 && f[0] == "conn1" {
				rows = append(rows, f)
			}
		}
		return rows
	}
	if r := rows(native + this); len(r) != 1 {
		t.Errorf("%d rows where one build was measured: %q", len(r), r)
	}
	r := rows(native + this + other)
	if len(r) != 2 {
		t.Fatalf("%d rows for two tables: %q", len(r), r)
	}
	if got, want := strings.Join(r[0], " "), "conn1 1000 275 conn/s 0.50 10 110 0 0 550 µs 1.0"; got != want {
		t.Errorf("beside native: %s, not %s", got, want)
	}
	if got, want := strings.Join(r[1], " "), "conn1 137.5 275 conn/s 2.00 440 110 0.25 5.5e+03 550 µs 0.10 2.0 1.0"; got != want {
		t.Errorf("beside the other build: %s, not %s", got, want)
	}
}

// What was measured beside a case has a table of its own, which is there only if something was.
func TestTableOfBesides(t *testing.T) {
	const in = `{"mode":"native","round":1,"case":"churn","value":500,"unit":"conn/s",
	"beside":[{"name":"download","value":8,"unit":"Gbit/s"},{"name":"round trip","p50_us":10,"p99_us":20}]}
{"mode":"through","round":1,"case":"churn","value":400,"unit":"conn/s",
	"beside":[{"name":"download","value":4,"unit":"Gbit/s"},{"name":"round trip","p50_us":30,"p99_us":40}]}
{"mode":"through","round":2,"case":"churn","value":400,"unit":"conn/s",
	"beside":[{"name":"download","value":6,"unit":"Gbit/s"},{"name":"round trip","p50_us":50,"p99_us":60}]}
{"mode":"through","round":1,"case":"D1","value":4,"unit":"Gbit/s"}
`
	var out strings.Builder
	if err := table(strings.NewReader(strings.ReplaceAll(in, "\n\t", "")), &out); err != nil {
		t.Fatal(err)
	}
	_, second, ok := strings.Cut(out.String(), "meanwhile")
	if !ok || strings.Contains(second, "D1") {
		t.Fatalf("%s", &out)
	}
	for _, want := range []string{"churn download 8 5 0 Gbit/s 0 0 0 0 0 0", "churn round trip 0 0 0 10 40 0 20 50 0"} {
		if !strings.Contains(strings.Join(strings.Fields(second), " "), want) {
			t.Errorf("there is no %q in %s", want, second)
		}
	}
	out.Reset()
	err := table(strings.NewReader(`{"mode":"through","round":1,"case":"D1","value":4}`), &out)
	if err != nil || strings.Contains(out.String(), "meanwhile") {
		t.Errorf("%v, %s", err, &out)
	}
}
