package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestChanges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	list := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list("a.example\n")
	base := []string{
		"--proxy",
		"socks5://h",
		"--rule",
		"port 25 reject",
		"--rule",
		"port 80 direct",
		"--rule",
		"list=" + file + " drop",
	}
	old := parse(t, base...)
	for _, tt := range []struct {
		args []string
		list string
		want []string
	}{
		{base, "a.example\n", nil},
		{base, "# the same\nA.example.\n", nil},
		{base, "b.example\n", []string{"list changed: FILE has 1 entries"}},
		{base, "a.example\n10.0.0.0/8\n", []string{"list changed: FILE has 2 entries"}},
		{append(slices.Clone(base), "--rule", "port 25 reject"), "a.example\n", []string{"rule added: port 25 reject"}},
		{base[:6], "a.example\n", []string{"rule removed: list=FILE drop"}},
		{append(slices.Clone(base[:2]), append(slices.Clone(base[4:]), base[2:4]...)...), "a.example\n",
			[]string{"the rules have another order"}},
		{append([]string{"--proxy", "socks5://i:9"}, base[2:]...), "a.example\n",
			[]string{"upstream removed: proxy socks5://h:1080", "upstream added: proxy socks5://i:9"}},
		{append([]string{"--upstream", "b=socks5://h"}, base[2:]...), "a.example\n",
			[]string{"upstream removed: proxy socks5://h:1080", "upstream added: b socks5://h:1080",
				"what no rule matches: via proxy, now refused"}},
	} {
		list(tt.list)
		var got []string
		for _, s := range changes(old, parse(t, tt.args...)) {
			got = append(got, strings.ReplaceAll(s, file, "FILE"))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%v: got %q, want %q", tt.args, got, tt.want)
		}
	}
	many := []string{"--proxy", "socks5://h"}
	for i := range 60 {
		many = append(many, "--rule", fmt.Sprintf("port %d drop", i+1))
	}
	if got := changes(old, parse(t, many...)); len(got) != maxChanges+1 || got[maxChanges] != "and 13 changes more" {
		t.Errorf("%d lines, the last is %q", len(got), got[len(got)-1])
	}
}
