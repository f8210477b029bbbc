package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestExec runs a second program in the network of the first one, which has a name, as root and as an ordinary user: it sees
// the same interfaces and its exit status is given on. --pid-file and --ready-fd tell when that is possible.
func TestExec(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	proxy := listenSOCKS(t)
	asUsers(t, func(t *testing.T, uid int, dir string) {
		as := func(args ...string) *exec.Cmd {
			cmd := exec.Command(viasocks, args...)
			cmd.Dir = dir
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir, "http_proxy=x"}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
			return cmd
		}
		pidFile := filepath.Join(dir, "pid")
		ready, readyW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer ready.Close()
		first := as("run", "--proxy", proxy.URL(), "--name", "first", "--pid-file", pidFile, "--ready-fd", "3", "--",
			"sh", "-c", "test -e /proc/$$/fd/3 && echo open || echo closed; cat")
		first.ExtraFiles = []*os.File{readyW}
		in, err := first.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		first.Stdout, first.Stderr = &out, &out
		if err := first.Start(); err != nil {
			t.Fatal(err)
		}
		readyW.Close()
		defer func() { in.Close(); first.Wait() }()
		// the end comes only if the program has no copy
		if err := ready.SetReadDeadline(time.Now().Add(2 * testkit.Patience)); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(ready); string(b) != "READY\n" || err != nil {
			t.Fatalf("the descriptor got %q, %v", b, err)
		}
		if b, err := os.ReadFile(pidFile); string(b) != fmt.Sprintln(first.Process.Pid) || err != nil {
			t.Errorf("the file holds %q, %v", b, err)
		}
		// It is known to ps a moment after its start.
		var got []byte
		testkit.Eventually(t, "the program to be known", func() bool {
			got, _ = as("ps").CombinedOutput()
			return strings.Contains(string(got), "first (sh)")
		})
		script := `id -u; ls /sys/class/net; pwd; env | grep -c _proxy; readlink /proc/self/ns/net; exit 7`
		for _, name := range []string{"first", fmt.Sprint(first.Process.Pid)} {
			got, err := as("exec", name, "--", "sh", "-c", script).CombinedOutput()
			want := fmt.Sprintf("%d\nlo\ntun0\n%s\n0\nnet:", uid, dir)
			if exit, ok := err.(*exec.ExitError); !strings.HasPrefix(string(got), want) || !ok || exit.ExitCode() != 7 {
				t.Errorf("exec %s: %v\n%swant\n%s", name, err, got, want)
			}
			inside, err := os.Readlink("/proc/thread-self/ns/net")
			if err != nil || strings.Contains(string(got), inside) {
				t.Errorf("it is in our own namespace: %s, %v", got, err)
			}
		}
		for _, bad := range []string{"second", "1"} {
			got, err := as("exec", bad, "true").CombinedOutput()
			if err == nil || !strings.Contains(string(got), fmt.Sprintf("cannot exec in %q: none of your own programs", bad)) {
				t.Errorf("%v, %s", err, got)
			}
		}
		for program, want := range map[string]string{
			"/no/program": "exit status 127, viasocks: cannot run /no/program: no such file or directory\n",
			dir:           "exit status 126, viasocks: cannot run " + dir + ": is a directory\n",
		} {
			got, err := as("exec", "first", "--", program).CombinedOutput()
			if said := fmt.Sprintf("%v, %s", err, got); said != want {
				t.Errorf("exec of %s: %q, want %q", program, said, want)
			}
		}
		in.Close()
		if err := first.Wait(); err != nil || out.String() != "closed\n" {
			t.Errorf("the first program: %v\n%s", err, &out)
		}
		if _, err := os.Stat(pidFile); err == nil {
			t.Error("the file with the process id is still there")
		}
	})
}
