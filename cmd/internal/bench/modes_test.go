package main

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestInterval checks the ranks by the table of the sign test, and that the interval holds the median of a known
// distribution about as often as it says.
func TestInterval(t *testing.T) {
	ranks := map[int]int{6: 0, 8: 0, 9: 1, 12: 2, 15: 3, 20: 5, 25: 7}
	for n, k := range ranks {
		v := make([]float64, n)
		for i := range v {
			v[i] = float64(n - 1 - i)
		}
		if low, high := interval(v); low != float64(k) || high != float64(n-1-k) {
			t.Errorf("of %d values those at %v and %v, not at %d and %d", n, low, high, k, n-1-k)
		}
	}
	if low, high := interval([]float64{3, 1, 2}); low != 1 || high != 3 {
		t.Errorf("of three values: %v to %v", low, high)
	}
	if low, high := interval(nil); low != 0 || high != 0 {
		t.Errorf("of none: %v to %v", low, high)
	}
	random := rand.New(rand.NewPCG(1, 2))
	const trials = 4000
	held := 0
	for range trials {
		v := make([]float64, 15)
		for i := range v {
			v[i] = math.Exp(random.NormFloat64()) // its median is 1
		}
		if low, high := interval(v); low <= 1 && 1 <= high {
			held++
		}
	}
	if share := float64(held) / trials; share < 0.95 || share > 0.985 {
		t.Errorf("the interval holds the median in %.3f of the trials", share)
	}
}

// TestModes compares the CPU time of each unit of work in the same round, whatever the rounds' own speed.
func TestModes(t *testing.T) {
	in := `{"mode":"off","round":1,"case":"conn","unit":"conn/s","value":100,"work":1000,"cpu_s":1}
{"mode":"watch","round":1,"case":"conn","unit":"conn/s","value":90,"work":500,"cpu_s":0.55}
{"mode":"watch","round":2,"case":"conn","unit":"conn/s","value":45,"work":500,"cpu_s":1.1}
{"mode":"off","round":2,"case":"conn","unit":"conn/s","value":50,"work":1000,"cpu_s":2}
`
	var out strings.Builder
	if err := modesMain([]string{"--to", "off"}, strings.NewReader(in), &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"conn off 2 1500 µs 1.000 1.000 1.000 1.000",
		"conn watch 2 1650 µs 1.100 1.100 1.100 0.900",
	} {
		if got := strings.Join(strings.Fields(out.String()), " "); !strings.Contains(got, want) {
			t.Errorf("got\n%s\nwant the line %s", &out, want)
		}
	}
	if err := modesMain(nil, strings.NewReader("{"), &out); err == nil {
		t.Error("half a line is no error")
	}
}
