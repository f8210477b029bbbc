package config

import (
	"strings"

	"github.com/agnivade/levenshtein"
)

// DidYouMean returns a question that names the candidate that word probably stands for, with prefix before it, as in
// " (did you mean --publish?)", or "" if there is none or more than one.
func DidYouMean(word, prefix string, candidates []string) string {
	if best := nearest(word, candidates); best != "" {
		return " (did you mean " + prefix + best + "?)"
	}
	return ""
}

// nearest returns the one candidate that begins with word, or else the one with the fewest wrong letters: two at most, and
// only one in a word of up to three. Two neighbours that have changed places count as one, and capitals as small letters. It
// returns "" if there is none, or more than one with as few.
func nearest(word string, candidates []string) string {
	const short, long = 3, 64
	if word == "" || len(word) > long {
		return ""
	}
	word = strings.ToLower(word)
	limit := 2
	if len(word) <= short {
		limit = 1
	}
	begins := func(c string) int {
		if strings.HasPrefix(c, word) {
			return 0
		}
		return limit + 1
	}
	wrong := func(c string) int {
		if swapped(word, c) {
			return 1
		}
		return levenshtein.ComputeDistance(word, c)
	}
	if best := least(candidates, limit, begins); best != "" {
		return best
	}
	return least(candidates, limit, wrong)
}

// swapped reports whether a is b with two neighbours in each other's place.
func swapped(a, b string) bool {
	for i := 0; i+1 < len(a) && len(a) == len(b); i++ {
		if a[i] != b[i] {
			return a[i] == b[i+1] && a[i+1] == b[i] && a[i+2:] == b[i+2:]
		}
	}
	return false
}

// least returns the one candidate whose rank is the least, if that is limit or less.
func least(candidates []string, limit int, rank func(string) int) string {
	best, lowest := "", limit+1
	for _, c := range candidates {
		switch r := rank(c); {
		case r < lowest:
			best, lowest = c, r
		case r == lowest:
			best = ""
		}
	}
	return best
}

// optionNames returns the names of the options that f accepts.
func optionNames(f func(o *Option) bool) []string {
	var names []string
	for i := range Options {
		if f(&Options[i]) {
			names = append(names, Options[i].Name)
		}
	}
	return names
}
