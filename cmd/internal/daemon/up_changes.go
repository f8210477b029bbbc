package daemon

import (
	"fmt"
	"slices"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// maxChanges is how many lines a reload logs about what it changed.
const maxChanges = 50

// changes describes what a reload changes in the rules and upstreams, one line for each.
func changes(old, next *config.Config) (out []string) {
	rules := func(c *config.Config) (all []string) {
		for i := range c.Rules {
			all = append(all, c.Rules[i].String())
		}
		return all
	}
	upstreams := func(c *config.Config) (all []string) {
		for _, u := range c.Upstreams {
			line := u.Name
			for _, s := range u.Servers() {
				line += " " + s.String()
			}
			if u.Via != "" {
				line += " via " + u.Via
			}
			all = append(all, line)
		}
		return all
	}
	out = append(out, differences("upstream", upstreams(old), upstreams(next))...)
	was, is := rules(old), rules(next)
	moved := differences("rule", was, is)
	out = append(out, moved...)
	if len(moved) == 0 && !slices.Equal(was, is) {
		out = append(out, "the rules have another order")
	}
	for i := range next.Rules {
		r := &next.Rules[i]
		j := slices.Index(was, r.String())
		if r.List() != "" && j >= 0 && !r.SameList(&old.Rules[j]) {
			out = append(out, fmt.Sprintf("list changed: %s has %d entries", r.List(), r.ListLen()))
		}
	}
	if old.Default != next.Default {
		out = append(out, "what no rule matches: "+defaultWord(old)+", now "+defaultWord(next))
	}
	if len(out) > maxChanges {
		more := len(out) - maxChanges
		out = append(out[:maxChanges:maxChanges], fmt.Sprintf("and %d changes more", more))
	}
	return out
}

func defaultWord(c *config.Config) string {
	if c.Default == "" {
		return "refused"
	}
	return "via " + c.Default
}

// differences lists what was removed and added. Repeated entries are counted.
func differences(what string, was, is []string) (out []string) {
	left := map[string]int{}
	for _, s := range is {
		left[s]++
	}
	for _, s := range was {
		if left[s]--; left[s] < 0 {
			out = append(out, what+" removed: "+s)
		}
	}
	clear(left)
	for _, s := range was {
		left[s]++
	}
	for _, s := range is {
		if left[s]--; left[s] < 0 {
			out = append(out, what+" added: "+s)
		}
	}
	return out
}
