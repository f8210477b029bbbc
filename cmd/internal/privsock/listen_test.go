package privsock

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()
}

// alone checks that dir contains only these files.
func alone(t *testing.T, dir string, want ...string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	if strings.Join(names, " ") != strings.Join(want, " ") {
		t.Errorf("the directory contains %q, want %q", names, want)
	}
}

// The socket has its mode whatever the umask is, answers, and goes with its listener.
func TestListen(t *testing.T) {
	testkit.CheckLeaks(t)
	for _, umask := range []int{0, 0o022, 0o777} {
		old := unix.Umask(umask)
		dir := t.TempDir()
		unix.Umask(old)
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "s")
		for group, want := range map[int]os.FileMode{-1: 0o600, os.Getegid(): 0o660} {
			unix.Umask(umask)
			l, err := Listen(path, group)
			got := unix.Umask(old)
			if err != nil {
				t.Fatal(err)
			}
			if got != umask {
				t.Errorf("the umask is %#o, it was %#o", got, umask)
			}
			if umask == 0o777 && group < 0 {
				want = 0 // the user wants it so
			}
			if m := mode(t, path); m != want {
				t.Errorf("umask %#o, group %d: mode %#o, want %#o", umask, group, m, want)
			}
			alone(t, dir, "s")
			if umask != 0o777 {
				c, err := net.Dial("unix", path)
				if err != nil {
					t.Fatal(err)
				}
				c.Close()
			}
			if err := errors.Join(l.Close()); err != nil {
				t.Error(err)
			}
			_ = l.Close()
			alone(t, dir)
		}
	}
}

// A path as long as a socket's may be works, although the name that the socket has first is longer.
func TestListenLongPath(t *testing.T) {
	testkit.CheckLeaks(t)
	dir, err := os.MkdirTemp("/tmp", "p")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	dir = filepath.Join(dir, strings.Repeat("d", maxPath-len(dir)-3))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	if len(path) != maxPath {
		t.Fatal(len(path))
	}
	l, err := Listen(path, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// What is there already stays, and nothing else is left behind.
func TestListenTaken(t *testing.T) {
	testkit.CheckLeaks(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := Listen(path, -1); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("%v, %v", l, err)
	}
	if err := RemoveStale(path); err == nil || !strings.Contains(err.Error(), "another file is there") {
		t.Error(err)
	}
	alone(t, dir, "s")
	if b, err := os.ReadFile(path); string(b) != "mine" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := Listen(filepath.Join(dir, "no", "s"), -1); !errors.Is(err, syscall.ENOENT) {
		t.Error(err)
	}
}

// A listener that is closed leaves a socket alone that another process has put in place of its own.
func TestCloseLeavesOthers(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	one, err := Listen(path, -1)
	if err != nil {
		t.Fatal(err)
	}
	if err := RemoveStale(path); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("a socket that answers was removed: %v", err)
	}
	if err := RemoveUnused(path); err != nil {
		t.Fatal(err)
	}
	two, err := Listen(path, -1)
	if err != nil {
		t.Fatal(err)
	}
	one.Close()
	if c, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		if p := PeerOf(c.(*net.UnixConn)); !p.Owner() || int(p.PID) != os.Getpid() {
			t.Errorf("%+v", p)
		}
		c.Close()
	}
	two.Close()
}

func TestRemoveStale(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	if err := RemoveStale(path); err != nil {
		t.Error(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := RemoveStale(path); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestDirs(t *testing.T) {
	testkit.CheckLeaks(t)
	dir := filepath.Join(t.TempDir(), "d")
	old := unix.Umask(0o077)
	err := MakeDir(dir)
	unix.Umask(old)
	if err != nil || mode(t, dir) != 0o755 {
		t.Fatalf("%v, mode %#o", err, mode(t, dir))
	}
	for _, tt := range []struct {
		mode       os.FileMode
		make, open bool
	}{{0o700, true, true}, {0o755, true, false}, {0o775, false, false}, {0o777, false, false}} {
		if err := os.Chmod(dir, tt.mode); err != nil {
			t.Fatal(err)
		}
		if err := MakeDir(dir); (err == nil) != tt.make {
			t.Errorf("%#o: %v", tt.mode, err)
		}
		if IsOwnDir(dir, os.Geteuid()) != tt.make || IsOwnDir(dir, os.Geteuid()+1) {
			t.Errorf("%#o: IsOwnDir", tt.mode)
		}
		f, err := OpenDir(dir, os.Geteuid())
		if (err == nil) != tt.open {
			t.Errorf("%#o: %v", tt.mode, err)
		}
		if err == nil {
			f.Close()
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(dir, os.Geteuid()+1); err == nil || !strings.Contains(err.Error(), "belongs to another user") {
		t.Error(err)
	}
	link := dir + "-link"
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(link, os.Geteuid()); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Error(err)
	}
}
