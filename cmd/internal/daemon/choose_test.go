package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A program that cannot be run is refused as run refuses it, and nobody is asked.
func TestChooseWithoutProgram(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	asked := func() error { return errors.New("asked") }
	for program, want := range map[string]struct {
		exit int
		err  string
	}{
		"/no/program":  {127, "cannot run /no/program: no such file or directory"},
		"nosuchthing0": {127, "cannot run nosuchthing0: executable file not found in $PATH"},
		file:           {126, "cannot run " + file + ": permission denied"},
		"/bin/sh":      {126, "asked"},
	} {
		if exit, err := Choose(asked, []string{program}, nil); err == nil || err.Error() != want.err || exit != want.exit {
			t.Errorf("%s: %d, %v", program, exit, err)
		}
	}
}
