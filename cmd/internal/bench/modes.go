package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// modesMain prints what scripts/seecost.sh measured: each mode compared with one of them.
func modesMain(args []string, in io.Reader, out io.Writer) error {
	fs := flag.NewFlagSet("modes", flag.ExitOnError)
	to := fs.String("to", "off", "the mode with which the others are compared")
	fs.Parse(args)
	lines, err := readLines(in)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "case\tmode\trounds\tCPU\tper\tto %s\t95 %% between\tand\trate to %s\t\n", *to, *to)
	for _, g := range groups(lines) {
		base := g.modes[*to]
		for _, mode := range g.order {
			ls := g.modes[mode]
			cpu, per := cpuPer(ls)
			all := ratios(ls, base, cpuEach)
			low, high := interval(all)
			fmt.Fprintf(w, "%s\t%s\t%d\t%.4g\t%s\t%.3f\t%.3f\t%.3f\t%.3f\t\n", g.name, mode, len(ls), cpu, per,
				medianOf(all), low, high, ratio(ls, base, value))
		}
	}
	return w.Flush()
}

// readLines reads the results of load with what a script added to them.
func readLines(in io.Reader) (lines []line, err error) {
	sc := bufio.NewScanner(in)
	for sc.Scan() {
		var l line
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			return nil, fmt.Errorf("cannot read a result: %w: %s", err, sc.Text())
		}
		lines = append(lines, l)
	}
	return lines, sc.Err()
}

// group has the lines of one case, by mode.
type group struct {
	name  string
	order []string // the modes, as they first came
	modes map[string][]line
}

func groups(lines []line) (all []*group) {
	for _, l := range lines {
		i := slices.IndexFunc(all, func(g *group) bool { return g.name == l.Case })
		if i < 0 {
			i = len(all)
			all = append(all, &group{name: l.Case, modes: map[string][]line{}})
		}
		g := all[i]
		if g.modes[l.Mode] == nil {
			g.order = append(g.order, l.Mode)
		}
		g.modes[l.Mode] = append(g.modes[l.Mode], l)
	}
	return all
}

// interval returns the limits between which the median of what v was drawn from lies with a probability of 95 %. It
// assumes nothing about the distribution: each value is above the median with probability 1/2. With fewer than six
// values it returns the least and the greatest, whose probability is lower.
func interval(v []float64) (low, high float64) {
	if len(v) == 0 {
		return 0, 0
	}
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	// tail is the probability that at most k of n values are below the median.
	term := 1.0
	for range n {
		term /= 2
	}
	k, tail := 0, 0.0
	for ; k < n/2; k++ {
		tail += term
		if tail > 0.025 {
			break
		}
		term *= float64(n-k) / float64(k+1)
	}
	k = max(k-1, 0)
	return v[k], v[n-1-k]
}
