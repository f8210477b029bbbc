package process

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The file of --pid-file is removed at the end, unless it is another one by then. A pipe in its place is not waited for.
func TestPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	for name, change := range map[string]func() error{
		"ours":        nil,
		"another's":   func() error { return os.WriteFile(path, []byte("1\n"), 0o644) },
		"a pipe":      func() error { _ = os.Remove(path); return syscall.Mkfifo(path, 0o600) },
		"a link":      func() error { _ = os.Remove(path); return os.Symlink("/nonexistent", path) },
		"gone before": func() error { return os.Remove(path) },
	} {
		end, err := Announce(path, -1)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != strconv.Itoa(os.Getpid())+"\n" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		if change != nil {
			if err := change(); err != nil {
				t.Fatal(err)
			}
		}
		end()
		_, err = os.Lstat(path)
		if left := err == nil; left != (name != "ours" && name != "gone before") {
			t.Errorf("%s: the file is left: %v", name, left)
		}
		_ = os.Remove(path)
	}
}

func TestPIDFileErrors(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/nonexistent", link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir:                          "it is a directory: choose another file",
		link:                         "it is a symbolic link: choose another file",
		filepath.Join(dir, "no/pid"): "no such file or directory: make its directory",
	} {
		if _, err := Announce(path, -1); err == nil || err.Error() != "cannot write the process id to "+path+": "+want {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestReadyFD(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := KeepReadyFD(int(w.Fd())); err == nil || !strings.Contains(err.Error(), "it must be open") {
		t.Errorf("a descriptor of our own, which the caller has not opened: %v", err)
	}
	for _, f := range []*os.File{r, w} { // as those that a caller opens
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := KeepReadyFD(int(r.Fd())); err == nil || !strings.Contains(err.Error(), "it is open only for reading") {
		t.Error(err)
	}
	if err := KeepReadyFD(int(w.Fd())); err != nil {
		t.Error(err)
	}
	if err := KeepReadyFD(1 << 20); err == nil || !strings.Contains(err.Error(), "it must be open") {
		t.Error(err)
	}
}
