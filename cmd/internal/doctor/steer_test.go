package doctor

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestReopen: a namespace is named by what --pid and --netns find.
func TestReopen(t *testing.T) {
	const attach, down = "viasocks attach %s (with the same options) carries it again; ", "viasocks down %[1]s opens it"
	for path, want := range map[string]string{
		"/proc/12/ns/net":      fmt.Sprintf(attach+down, "--pid=12"),
		"/run/netns/blue":      fmt.Sprintf(attach+down, "--netns=blue"),
		"/run/docker/netns/1a": "ln -s /run/docker/netns/1a /run/netns/ gives it a name; then viasocks attach --netns=1a ",
	} {
		links := strings.HasPrefix(want, "ln -s")
		if got := reopen(path); !strings.Contains(got, want) || strings.Contains(got, "ln -s") != links {
			t.Errorf("%s: %s", path, got)
		}
	}
}

// TestCalling: a name stays when a process ends, and comes first.
func TestCalling(t *testing.T) {
	for _, tt := range []struct{ name, words, path string }{
		{"svc", "svc", "/run/netns/svc"},
		{"", "net:[7]", "/proc/41/ns/net"},
	} {
		if words, path := calling(tt.name, "/proc/41/ns/net", 7); words != tt.words || path != tt.path {
			t.Errorf("%+v: %s, %s", tt, words, path)
		}
	}
}

// TestLeftClosed: a namespace with a journal and without a living viasocks is named, with what opens it, as long as somebody
// uses it.
func TestLeftClosed(t *testing.T) {
	testkit.CheckLeaks(t)
	program := exec.Command("sleep", "60")
	program.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := program.Start(); err != nil {
		t.Skipf("cannot make a network namespace: %v", err)
	}
	defer func() { _ = program.Process.Kill(); _ = program.Wait() }()
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", program.Process.Pid), &st); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	own, err := kernel.JournalPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	var ours unix.Stat_t // of this thread: another test may have left the first one, whose namespace is that of /proc/self
	if err := unix.Stat("/proc/thread-self/ns/net", &ours); err != nil {
		t.Fatal(err)
	}
	theirs := strings.Replace(own, fmt.Sprint(ours.Ino), fmt.Sprint(st.Ino), 1)
	for _, path := range []string{own, theirs, dir + "/host-1-another-boot.journal", dir + "/host-x.journal"} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all := leftClosed(dir)
	want := fmt.Sprintf("viasocks down --pid=%d opens it", program.Process.Pid)
	if len(all) != 1 || !strings.Contains(all[0].Found, fmt.Sprintf("net:[%d] is still closed", st.Ino)) ||
		!strings.Contains(all[0].Do, want) {
		t.Errorf("%+v, want %q", all, want)
	}
	lock, err := control.TakeHost(control.PathIn(dir, st.Ino))
	if err != nil {
		t.Fatal(err)
	}
	if all := leftClosed(dir); len(all) > 0 {
		t.Errorf("a viasocks is alive: %+v", all)
	}
	if err := lock.Close(); err != nil {
		t.Error(err)
	}
	_ = program.Process.Kill()
	_ = program.Wait()
	if all := leftClosed(dir); len(all) > 0 {
		t.Errorf("the namespace has ended: %+v", all)
	}
}
