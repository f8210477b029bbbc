package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// line is a result with what scripts/bench.sh adds to it.
type line struct {
	Mode  string `json:"mode"` // native, through
	Round int    `json:"round"`
	result
}

// table reads lines of JSON and prints a row for each case: medians over the rounds, and the median of the ratios of
// the rounds, since the two of one round were measured one after the other.
func table(in io.Reader, out io.Writer) error {
	var order []string
	byCase := map[string]map[string][]line{}
	sc := bufio.NewScanner(in)
	for sc.Scan() {
		var l line
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			return fmt.Errorf("cannot read a result: %w: %s", err, sc.Text())
		}
		if byCase[l.Case] == nil {
			byCase[l.Case] = map[string][]line{}
			order = append(order, l.Case)
		}
		byCase[l.Case][l.Mode] = append(byCase[l.Case][l.Mode], l)
	}
	if err := sc.Err(); err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "case\tnative\tthrough\tunit\tratio\tp50 µs nat\tthr\tp99 µs nat\tthr\tCPU\tper\tRSS MiB\t")
	for _, name := range order {
		nat, thr := byCase[name]["native"], byCase[name]["through"]
		var ratios []float64
		for _, t := range thr {
			for _, n := range nat {
				if n.Round == t.Round && n.Value > 0 {
					ratios = append(ratios, t.Value/n.Value)
				}
			}
		}
		cpu, per := cpuPer(thr)
		fmt.Fprintf(w, "%s\t%.4g\t%.4g\t%s\t%.2f\t%.0f\t%.0f\t%.0f\t%.0f\t%.3g\t%s\t%.1f\t\n", name,
			median(nat, func(l line) float64 { return l.Value }), median(thr, func(l line) float64 { return l.Value }), unit(nat, thr),
			medianOf(ratios),
			median(nat, func(l line) float64 { return l.P50us }), median(thr, func(l line) float64 { return l.P50us }),
			median(nat, func(l line) float64 { return l.P99us }), median(thr, func(l line) float64 { return l.P99us }),
			cpu, per, median(thr, func(l line) float64 { return float64(l.RSS) / (1 << 20) }))
	}
	return w.Flush()
}

func unit(ls ...[]line) string {
	for _, l := range ls {
		if len(l) > 0 {
			return l[0].Unit
		}
	}
	return ""
}

// cpuPer is the redirector's CPU for each unit of work: seconds per GB, or microseconds per thing.
func cpuPer(ls []line) (float64, string) {
	scale, per := 1e6, "µs"
	if unit(ls) == "Gbit/s" {
		scale, per = 1e9, "s/GB"
	}
	return median(ls, func(l line) float64 {
		if l.Work == 0 {
			return 0
		}
		return l.CPU * scale / l.Work
	}), per
}

func median(ls []line, f func(line) float64) float64 {
	v := make([]float64, len(ls))
	for i, l := range ls {
		v[i] = f(l)
	}
	return medianOf(v)
}

func medianOf(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	if len(v)%2 == 1 {
		return v[len(v)/2]
	}
	return (v[len(v)/2-1] + v[len(v)/2]) / 2
}
