package kernel

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// The end of a journal is also the end of the drafts that killed writers have left, and of nothing else.
func TestRemoveFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "host-1-a.journal")
	for _, name := range []string{"host-1-a.journal", "host-1-a.journal.3395609032", "host-1-a.journal.7", "host-1-a.journal.old",
		"host-1-a.lock", "host-12-a.journal", "host-12-a.journal.5"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // a journal that does not exist is no error
		if err := removeFile(path); err != nil {
			t.Fatal(err)
		}
	}
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, f := range all {
		left = append(left, f.Name())
	}
	want := []string{"host-1-a.journal.old", "host-1-a.lock", "host-12-a.journal", "host-12-a.journal.5"}
	if !slices.Equal(left, want) {
		t.Errorf("left are %q, want %q", left, want)
	}
}
