package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// line is a result together with what scripts/bench.sh adds to it.
type line struct {
	Mode  string `json:"mode"` // native, through, against; of scripts/seecost.sh: off, watch...
	Round int    `json:"round"`
	result
}

// table reads lines of JSON and prints a row for each case: medians over the rounds.
func table(in io.Reader, out io.Writer) error {
	lines, err := readLines(in)
	if err != nil {
		return err
	}
	var order []string
	byCase := map[string]map[string][]line{}
	for _, g := range groups(lines) {
		order = append(order, g.name)
		byCase[g.name] = g.modes
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "case\tnative\tthrough\tunit\tratio\tp50 µs nat\tthr\tp99 µs nat\tthr\tCPU\tper\tRSS MiB\t")
	for _, name := range order {
		nat, thr := byCase[name]["native"], byCase[name]["through"]
		cpu, per := cpuPer(thr)
		fmt.Fprintf(w, "%s\t%.4g\t%.4g\t%s\t%.2f\t%.0f\t%.0f\t%.0f\t%.0f\t%.3g\t%s\t%.1f\t\n", name,
			median(nat, value), median(thr, value), unit(nat, thr), ratio(thr, nat, value),
			median(nat, p50), median(thr, p50), median(nat, p99), median(thr, p99), cpu, per, median(thr, rss))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := besides(order, byCase, out); err != nil {
		return err
	}
	return compared(order, byCase, out)
}

// besides prints the additional measurements of the cases that have them.
func besides(order []string, byCase map[string]map[string][]line, out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	some := false
	for _, name := range order {
		modes := [][]line{byCase[name]["native"], byCase[name]["through"], byCase[name]["against"]}
		for i, f := range figures(modes) {
			if !some {
				fmt.Fprintln(w, "\ncase\tmeanwhile\tnative\tthrough\tagainst\tunit\tp50 µs nat\tthr\tag\tp99 µs nat\tthr\tag\t")
				some = true
			}
			row := func(of func(figure) float64) (cells string) {
				for _, ls := range modes {
					cells += fmt.Sprintf("%.4g\t", median(ls, func(l line) float64 { return of(l.Beside[i]) }))
				}
				return cells
			}
			fmt.Fprintf(w, "%s\t%s\t%s%s\t%s%s\n", name, f.Name, row(func(f figure) float64 { return f.Value }), f.Unit,
				row(func(f figure) float64 { return f.P50us }), row(func(f figure) float64 { return f.P99us }))
		}
	}
	return w.Flush()
}

// figures returns the measurements that all lines have.
func figures(modes [][]line) []figure {
	var common []figure
	first := true
	for _, ls := range modes {
		for _, l := range ls {
			if first || len(l.Beside) < len(common) {
				common, first = l.Beside, false
			}
		}
	}
	return common
}

// compared prints the second table, if there was a second build: this build compared with it.
func compared(order []string, byCase map[string]map[string][]line, out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	some := false
	for _, name := range order {
		now, before := byCase[name]["through"], byCase[name]["against"]
		if len(now) == 0 || len(before) == 0 {
			continue
		}
		if !some {
			fmt.Fprintln(
				w,
				"\ncase\tagainst\tthis\tunit\tratio\tp50 µs ag\tthis\tratio\tCPU ag\tthis\tper\tratio\tRSS MiB ag\tthis\t",
			)
			some = true
		}
		cpuBefore, _ := cpuPer(before)
		cpu, per := cpuPer(now)
		fmt.Fprintf(w, "%s\t%.4g\t%.4g\t%s\t%.2f\t%.0f\t%.0f\t%.2f\t%.3g\t%.3g\t%s\t%.2f\t%.1f\t%.1f\t\n", name,
			median(before, value), median(now, value), unit(now), ratio(now, before, value),
			median(before, p50), median(now, p50), ratio(now, before, p50),
			cpuBefore, cpu, per, ratio(now, before, cpuEach), median(before, rss), median(now, rss))
	}
	return w.Flush()
}

func value(l line) float64 { return l.Value }
func p50(l line) float64   { return l.P50us }
func p99(l line) float64   { return l.P99us }
func rss(l line) float64   { return float64(l.RSS) / (1 << 20) }

// cpuEach returns the redirector's CPU seconds for each unit of work.
func cpuEach(l line) float64 {
	if l.Work == 0 {
		return 0
	}
	return l.CPU / l.Work
}

// ratio returns the median of the ratios of the rounds: the two results of one round were measured one after the
// other.
func ratio(a, b []line, of func(line) float64) float64 { return medianOf(ratios(a, b, of)) }

// ratios returns the ratio of a to b in each round that both have.
func ratios(a, b []line, of func(line) float64) (all []float64) {
	for _, x := range a {
		for _, y := range b {
			if x.Round == y.Round && of(y) > 0 {
				all = append(all, of(x)/of(y))
			}
		}
	}
	return all
}

func unit(ls ...[]line) string {
	for _, l := range ls {
		if len(l) > 0 {
			return l[0].Unit
		}
	}
	return ""
}

// cpuPer returns the redirector's CPU time for each unit of work: seconds per GB, or microseconds per item.
func cpuPer(ls []line) (float64, string) {
	scale, per := 1e6, "µs"
	if unit(ls) == "Gbit/s" {
		scale, per = 1e9, "s/GB"
	}
	return median(ls, func(l line) float64 { return cpuEach(l) * scale }), per
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
