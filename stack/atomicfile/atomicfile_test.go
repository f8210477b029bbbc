package atomicfile

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	text := func(s string) func(io.Writer) error {
		return func(w io.Writer) error {
			during, _ := os.ReadDir(dir)
			for _, e := range during {
				if e.Name() != "f" && !strings.HasPrefix(e.Name(), Unfinished(path)) {
					t.Errorf("%s is not named as an unfinished file", e.Name())
				}
			}
			_, err := io.WriteString(w, s)
			return err
		}
	}
	check := func(want string, mode os.FileMode) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil || string(b) != want {
			t.Errorf("%q, %v", b, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("mode %v, want %v", info.Mode(), mode)
		}
		if all, _ := os.ReadDir(dir); len(all) != 1 {
			t.Errorf("left behind: %v", all)
		}
	}
	if err := Replace(path, 0o644, text("one")); err != nil {
		t.Fatal(err)
	}
	check("one", 0o644)
	if err := ReplaceOnDisk(path, 0o600, text("two")); err != nil {
		t.Fatal(err)
	}
	check("two", 0o600)
	broken := errors.New("broken")
	for _, replace := range []func(string, os.FileMode, func(io.Writer) error) error{Replace, ReplaceOnDisk} {
		if err := replace(path, 0o644, func(w io.Writer) error { _ = text("half")(w); return broken }); err != broken {
			t.Error(err)
		}
		check("two", 0o600)
		if err := replace(filepath.Join(dir, "no", "f"), 0o644, text("x")); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
	// A name that cannot be replaced, and a file that is already complete.
	if err := Replace(dir, 0o644, text("x")); err == nil {
		t.Error("a directory was replaced")
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), Unfinished(dir)+"*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// What is not a file stays what it is: a device would be lost, and so would a link.
func TestReplaceOnlyFiles(t *testing.T) {
	dir := t.TempDir()
	fifo, link, broken := filepath.Join(dir, "fifo"), filepath.Join(dir, "link"), filepath.Join(dir, "broken")
	err := errors.Join(syscall.Mkfifo(fifo, 0o600), os.Symlink(fifo, link), os.Symlink(filepath.Join(dir, "nothing"), broken))
	if err != nil {
		t.Fatal(err)
	}
	for path, why := range map[string]string{
		dir: "it is a directory", fifo: "it is not a regular file",
		link: "it is a symbolic link", broken: "it is a symbolic link",
	} {
		before, _ := os.Lstat(path)
		err := Replace(path, 0o644, func(io.Writer) error { return nil })
		if err == nil || !strings.HasSuffix(err.Error(), why) {
			t.Errorf("%s: %v, want %q", path, err, why)
		}
		if after, err := os.Lstat(path); err != nil || after.Mode() != before.Mode() {
			t.Errorf("%s was %v and is %v, %v", path, before.Mode(), after, err)
		}
	}
}
