package config

import (
	"strings"
	"testing"
)

func TestNearest(t *testing.T) {
	options := []string{"proxy", "publish", "publish-unix", "listen", "proxy-ca", "lan", "log-level", "up", "down", "status"}
	for word, want := range map[string]string{
		"prxy":                   "proxy",
		"prox":                   "proxy",
		"proxxy":                 "proxy",
		"listne":                 "listen",
		"pub":                    "", // publish and publish-unix begin so
		"publish-":               "publish-unix",
		"log":                    "log-level",
		"upp":                    "up",
		"dwon":                   "down",
		"DOWN":                   "down",
		"lna":                    "lan", // one fault: two letters have changed places
		"nal":                    "",
		"stauts":                 "status",
		"lam":                    "lan",
		"xyz":                    "",
		"x":                      "",
		"":                       "",
		"remove":                 "",
		strings.Repeat("a", 100): "",
	} {
		if got := nearest(word, options); got != want {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
	}
	if got := DidYouMean("prxy", "--", options) + DidYouMean("zzzz", "--", options); got != " (did you mean --proxy?)" {
		t.Errorf("%q", got)
	}
}
