package e2e

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestPublishKilledAtAnyInstant kills each process of `run` at twenty instants after its start. Afterwards there are no
// processes, mounts and listening sockets of it, and the next start replaces the files that a killed viasocks could not
// remove.
func TestPublishKilledAtAnyInstant(t *testing.T) {
	needWorld(t)
	const instants, step = 20, 8 * time.Millisecond
	proxy := listenSOCKS(t)
	testkit.CheckLeaks(t)
	adoptAll(t)
	dir := t.TempDir()
	before := traces(t)
	for _, victim := range []string{"viasocks", "sleep", "viasocks-sockets"} {
		for i := range instants {
			cmd := startVictim(t, dir, proxy.URL())
			gone := make(chan struct{})
			go func() { _ = cmd.Wait(); close(gone) }()
			<-time.After(time.Duration(i) * step)
			if victim == "viasocks" {
				_ = cmd.Process.Kill()
			} else if pid := awaitChild(t, cmd.Process.Pid, victim, gone); pid != "" {
				signalPID(t, pid, syscall.SIGKILL)
			}
			if victim == "viasocks-sockets" { // the program goes on
				_ = cmd.Process.Signal(syscall.SIGTERM)
			}
			select {
			case <-gone:
			case <-time.After(testkit.Patience):
				_ = cmd.Process.Kill()
				t.Fatalf("viasocks did not end after the death of %s at %v", victim, time.Duration(i)*step)
			}
			reapAll(t, fmt.Sprintf("the death of %s at %v", victim, time.Duration(i)*step))
			noTrace(t, before, "a kill")
		}
	}
	leaveUnfinished(t, dir)
	cmd := startVictim(t, dir, proxy.URL())
	testkit.Eventually(t, "the unix socket to be replaced", func() bool {
		c, err := net.Dial("unix", filepath.Join(dir, "socket"))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	testkit.Eventually(t, "its process id in the file", func() bool {
		b, _ := os.ReadFile(filepath.Join(dir, "pid"))
		return string(b) == fmt.Sprintln(cmd.Process.Pid)
	})
	_ = cmd.Process.Signal(syscall.SIGTERM)
	_ = cmd.Wait()
	reapAll(t, "the end")
	if left := filesIn(t, dir); len(left) > 0 {
		t.Errorf("files are left: %v", left)
	}
}

// leaveUnfinished leaves what a viasocks leaves that is killed while it writes the file of --pid-file, which few instants hit. A
// young file may belong to one that is running, so all files become old.
func leaveUnfinished(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, ".pid-123"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, left := range filesIn(t, dir) {
		if err := os.Chtimes(left, time.Time{}, time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
}

// adoptAll makes what loses its parent our child, so that nothing can hide.
func adoptAll(t *testing.T) {
	t.Helper()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
}

// startVictim starts a viasocks that publishes two ports and writes what it can write.
func startVictim(t *testing.T, dir, proxy string) *exec.Cmd {
	t.Helper()
	return startSleeper(t, dir, "--proxy", proxy, "--publish", "0:80", "--publish-unix", filepath.Join(dir, "socket")+":80",
		"--pid-file", filepath.Join(dir, "pid"), "--name", "victim")
}

// startSleeper starts a viasocks whose program only sleeps, and which keeps its files in dir.
func startSleeper(t *testing.T, dir string, flags ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(viasocks, slices.Concat([]string{"run"}, flags, []string{"--", "sleep", "60"})...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

// awaitChild returns the child with this name as soon as there is one; empty: the parent has ended.
func awaitChild(t *testing.T, parent int, name string, gone <-chan struct{}) (pid string) {
	t.Helper()
	testkit.Eventually(t, "the process "+name, func() bool {
		select {
		case <-gone:
			return true
		default:
		}
		if all := childrenNamed(parent, name); len(all) > 0 {
			pid = all[0]
		}
		return pid != ""
	})
	return pid
}

// reapAll waits for the end of every process that has lost its parent. The program alone is ended by hand: it goes on, as the
// manual says. Servers of the test, which are in keep, stay.
func reapAll(t *testing.T, after string, keep ...string) {
	t.Helper()
	var left []string
	if !waitFor(func() bool {
		left = nil
		for _, pid := range children(os.Getpid()) {
			if slices.Contains(keep, pid) {
				continue
			}
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := syscall.Wait4(n, nil, syscall.WNOHANG, nil); got == n || err != nil {
				continue
			}
			name, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			if left = append(left, string(name)); strings.HasPrefix(string(name), "sleep\x00") {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
		return len(left) == 0
	}) {
		t.Fatalf("after %s there are still %q", after, left)
	}
}

// traces are the mounts and the listening sockets of this namespace.
func traces(t *testing.T) (all []string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	all = strings.Split(string(mounts), "\n")
	// Those of `ip netns` belong to others, whose end unmounts them here, too: the kernel detaches a mount from a file that is
	// removed, in every mount namespace.
	all = slices.DeleteFunc(all, func(line string) bool { return strings.Contains(line, " /run/netns/") })
	for _, name := range []string{"tcp", "tcp6", "udp", "udp6"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + name)
		if err != nil {
			continue // no IPv6
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 3 && (f[3] == "0A" || f[3] == "07") { // TCP_LISTEN, and bound UDP
				all = append(all, name+" "+f[1])
			}
		}
	}
	return all
}

// noTrace waits until the mounts and sockets are those of before, and says which are not.
func noTrace(t *testing.T, before []string, after string) {
	t.Helper()
	if testkit.Until(testkit.Patience, func() bool { return slices.Equal(traces(t), before) }) {
		return
	}
	now := traces(t)
	for _, l := range now {
		if !slices.Contains(before, l) {
			t.Errorf("after %s this is left: %s", after, l)
		}
	}
	for _, l := range before {
		if !slices.Contains(now, l) {
			t.Errorf("after %s this is missing: %s", after, l)
		}
	}
	t.Fatalf("after %s there are %d mounts and sockets, before %d", after, len(now), len(before))
}

// filesIn lists everything in dir that is no directory.
func filesIn(t *testing.T, dir string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all = append(all, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
