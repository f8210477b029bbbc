package kernel

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestProgramGroupNames: a journal may only name groups that Choose makes, because `down` moves their processes.
func TestProgramGroupNames(t *testing.T) {
	for _, c := range []struct {
		path string
		ok   bool
	}{
		{"viasocks-4026532000-exclude-12", true},
		{"user.slice/user-1000.slice/session-2.scope/viasocks-4026532000-include-12-2", true},
		{"system.slice/sshd.service", false},
		{"../viasocks-1-exclude-1", false},
		{"a/../viasocks-1-exclude-1", false},
		{"/viasocks-1-exclude-1", false},
		{"viasocks-1-exclude-1/more", false},
		{"viasocks-1-other-1", false},
		{"viasocks-1-exclude", false},
		{"", false},
	} {
		j := journal{Version: journalVersion, TUN: "t", Table: 1, NFTable: "n", Groups: []Group{{Path: c.path, ID: 7}}}
		b, err := json.Marshal(j)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "journal")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readJournal(file); (err == nil) != c.ok {
			t.Errorf("%q: %v, want ok %v", c.path, err, c.ok)
		}
	}
}

// TestLiveSets: each choice and depth has one set, and an included program is looked at before anything is excluded.
func TestLiveSets(t *testing.T) {
	c := Config{Marks: MarksFrom(0x76000000, 0xff000000), Exclude: Selection{UIDs: []UIDRange{{7, 7}}}}
	c.live = []liveGroup{
		{cgroup{"a", 1, 11}, ExcludeProgram, ""},
		{cgroup{"b", 1, 12}, ExcludeProgram, ""},
		{cgroup{"c/d", 2, 13}, ExcludeProgram, "x.service"},
		{cgroup{"e", 1, 14}, IncludeProgram, ""},
	}
	var names []string
	for _, s := range c.liveSets() {
		for _, e := range s.elems {
			names = append(names, s.name+" "+e.text)
		}
	}
	if got, want := strings.Join(names, ", "), `excluded1 "a", excluded1 "b", excluded2 "c/d", included1 "e"`; got != want {
		t.Errorf("sets:\n%s\nwant\n%s", got, want)
	}
	tables, err := c.tables(filterState{})
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(tables[0].lines(), "\n")
	include := strings.Index(text, "excluded socket cgroupv2 level 1 @included1 goto included")
	for _, later := range []string{"excluded meta skuid == 7", "excluded socket cgroupv2 level 2 @excluded2"} {
		if at := strings.Index(text, later); at < include || include < 0 {
			t.Errorf("%q is at %d, the included program at %d:\n%s", later, at, include, text)
		}
	}
}
