package netns

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeNamespace makes a file that stands for a namespace, and other names of it.
func fakeNamespace(t *testing.T, names ...string) ID {
	t.Helper()
	file := filepath.Join(t.TempDir(), "namespace")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(file, name); err != nil {
			t.Fatal(err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	return ID{st.Dev, st.Ino}
}

// A namespace is used by processes other than ours, whichever was seen last, and by files on which it is mounted.
func TestUsers(t *testing.T) {
	proc := t.TempDir()
	at := func(pid string) string { return filepath.Join(proc, pid, "ns/net") }
	id := fakeNamespace(t, at("10"), at("20"), at("30"))
	fakeNamespace(t, at("40")) // another one
	u := NewUsers(id, 10)
	u.proc, u.mounts = proc, filepath.Join(proc, "mountinfo")
	for _, pid := range []string{"20", "30"} {
		if !u.Any() {
			t.Fatalf("process %s is not seen", pid)
		}
		if u.last != at(pid) {
			t.Errorf("%s was seen, not %s", u.last, at(pid))
		}
		if err := os.Remove(at(pid)); err != nil {
			t.Fatal(err)
		}
	}
	if u.Any() {
		t.Errorf("%s is seen, and only our own process is left", u.last)
	}
	file := filepath.Join(proc, "a name")
	if err := os.Symlink(at("10"), file); err != nil {
		t.Fatal(err)
	}
	root := "net:[" + strconv.FormatUint(id.Ino, 10) + "]"
	line := "41 25 0:4 " + root + " " + filepath.Join(proc, `a\040name`) + " rw shared:9 - nsfs nsfs rw\n"
	if err := os.WriteFile(u.mounts, []byte("malformed\n"+line), 0o600); err != nil {
		t.Fatal(err)
	}
	if !u.Any() || u.last != file {
		t.Errorf("%q is seen, not %s", u.last, file)
	}
}

// What is no network namespace is refused.
func TestOpenNamespace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/proc/self/ns/uts", "/dev/null"} {
		if n, err := OpenNamespace(path); err == nil {
			n.Close()
			t.Errorf("%s was opened", path)
		}
	}
	n, err := OpenNamespace("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if !n.OfCaller() {
		t.Error("the own namespace is not the caller's")
	}
	n.Close() // it may be closed twice
}
