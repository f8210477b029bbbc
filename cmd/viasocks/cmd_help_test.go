package main

import "testing"

func TestHelp(t *testing.T) {
	golden(t, "help.txt", result(t, viasocks("help")))
	golden(t, "alone.txt", result(t, viasocks()))
	for _, c := range commands() {
		got := result(t, viasocks("help", c.name))
		golden(t, "help_"+c.name+".txt", got)
		if other := result(t, viasocks(c.name, "--help")); other != got {
			t.Errorf("%s --help is not help %s:\n%s", c.name, c.name, other)
		}
	}
	if got := result(t, viasocks("--help")); got != result(t, viasocks("help")) {
		t.Error(got)
	}
}
