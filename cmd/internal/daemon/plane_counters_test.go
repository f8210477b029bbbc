package daemon

import (
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/stack/count"
)

// TestTables: what is written beside a counter is complete, so that a new one cannot be forgotten in status or in the metrics.
func TestTables(t *testing.T) {
	name := regexp.MustCompile(`^[a-z]+(_[a-z0-9]+)*$`)
	label := regexp.MustCompile(`^[a-z]+=[a-z_0-9]+(,[a-z]+=[a-z_0-9]+)*$`)
	all := counters{ups: []upstreamCounters{{Route: route.UpstreamStats{Name: "proxy"}}}}
	helps, labelled, keys := map[string]string{}, map[string]bool{}, map[string]bool{}
	all.each(func(m count.Metric) {
		if !name.MatchString(m.Name) || m.Label != "" && !label.MatchString(m.Label) {
			t.Errorf("%q is no name", m.Key())
		}
		if keys[m.Key()] {
			t.Errorf("two numbers are called %q", m.Key())
		}
		keys[m.Key()] = true
		if total := strings.HasSuffix(m.Name, "_total"); total == (m.Gauge || m.Times != nil) {
			t.Errorf("%s: the names of counters, and of nothing else, end in _total", m.Name)
		}
		if has, seen := labelled[m.Name]; seen && has != (m.Label != "") {
			t.Errorf("%s has a label at some places only", m.Name)
		}
		labelled[m.Name] = m.Label != ""
		if m.Help != "" {
			if helps[m.Name] != "" {
				t.Errorf("%s is explained twice", m.Name)
			}
			helps[m.Name] = m.Help
		}
	})
	for n := range labelled {
		if !strings.HasSuffix(helps[n], ".") {
			t.Errorf("%s is not explained by a sentence: %q", n, helps[n])
		}
	}
	if len(keys) < 90 {
		t.Errorf("only %d numbers were found", len(keys))
	}
	sums := map[string]bool{"Up": true, "Down": true, "Reassociations": true} // the metrics have them by upstream
	nameless(t, reflect.TypeFor[counters](), sums)
	nameless(t, reflect.TypeFor[upstreamCounters](), map[string]bool{"Name": true})
}

// nameless reports numbers that neither status nor the metrics would show.
func nameless(t *testing.T, of reflect.Type, wanted map[string]bool) {
	for f := range of.Fields() {
		switch {
		case f.Type.Kind() == reflect.Slice || f.Tag.Get("metric") != "":
		case f.Type.Kind() == reflect.Struct:
			nameless(t, f.Type, wanted)
		case !wanted[f.Name]:
			t.Errorf("%v.%s has no name", of, f.Name)
		}
	}
}

func TestLost(t *testing.T) {
	var c counters
	c.Stack.DroppedICMP = 3
	c.Stack.DroppedMulticast, c.Stack.UDP.DroppedMulticast = 4, 5
	c.ups = []upstreamCounters{{Route: route.UpstreamStats{Name: "a"}}, {Route: route.UpstreamStats{Name: "b"}}}
	c.ups[0].Route.TooLarge, c.ups[1].Route.TooLarge = 2, 4
	c.Route.DNS.Refused = 7
	want := map[string]uint64{
		"ICMP (ping)": 3, "multicast and broadcast": 9, "datagrams too large for SOCKS": 6,
		"questions of DNS that --allow refuses": 7,
	}
	got := map[string]uint64{}
	for _, l := range c.lost() {
		got[l.What] = l.Packets
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if n := c.all()["packets_dropped_total{reason=icmp}"]; n != 3 {
		t.Errorf("%d packets of ICMP in %v", n, c.all())
	}
}
