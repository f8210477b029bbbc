package netns

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
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
	u.proc, u.mounts, u.named = proc, filepath.Join(proc, "mountinfo"), proc
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
	if got := u.Name(); got != "a name" {
		t.Errorf("its name is %q", got)
	}
	u.named = filepath.Join(proc, "elsewhere")
	if got := u.Name(); got != "" {
		t.Errorf("a file that is none of ip netns is taken for the name %q", got)
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
	n, err := OpenNamespace("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if !n.OfCaller() {
		t.Error("the own namespace is not the caller's")
	}
	n.Close() // it may be closed twice
}

// A namespace belongs to the user who made it, whoever asks.
func TestOwner(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to be two users")
	}
	for _, uid := range []uint32{0, 65534} {
		cmd := exec.Command("unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo; exec cat")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Skipf("cannot start a program as uid %d: %v", uid, err)
		}
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
			_ = cmd.Wait()
			t.Skipf("no user namespace for uid %d: %v", uid, err)
		}
		n, err := OpenNamespace(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if got := n.Owner(); got != int(uid) || n.OfCaller() {
			t.Errorf("the namespace of uid %d belongs to %d", uid, got)
		}
		n.Close()
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}
