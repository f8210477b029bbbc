package hosttest

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// envApart holds the name of the one test that a process made by apart runs.
const envApart = "HOSTTEST_APART"

// apartAtOnce is how many tests may run apart at the same time. They spend most of their time waiting.
const apartAtOnce = 6

// apart runs the calling test beside others of its kind, in a process that has namespaces of its own: its network
// namespaces, its /run and its process ids are then no concern of the others. It returns true in that process, where the
// test is to do its work, and false in the process that only waits for it.
func apart(t *testing.T) bool {
	t.Helper()
	if os.Getenv(envApart) == t.Name() {
		return true
	} else if os.Getenv(envApart) != "" {
		t.Skip("another test runs in this process")
	}
	if why := os.Getenv(envWhy); why != "" {
		t.Skip(why)
	}
	if testing.Short() {
		t.Skip("namespaces and the whole life of a daemon are not short")
	}
	t.Parallel()
	pattern := "^" + strings.ReplaceAll(regexp.QuoteMeta(t.Name()), "/", "$/^") + "$"
	cmd := exec.Command("/proc/self/exe", "-test.run="+pattern, "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), envApart+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	out, err := cmd.CombinedOutput()
	switch {
	case err != nil:
		t.Errorf("%v\n%s", err, out)
	case strings.Contains(string(out), "--- SKIP: "+t.Name()+" "):
		t.Skipf("%s", out)
	default:
		t.Logf("%s", out)
	}
	return false
}

// rootOfTheMachine skips a test that needs other users than root, where a user namespace has root alone.
func rootOfTheMachine(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/uid_map")
	if f := strings.Fields(string(b)); err != nil || len(f) != 3 || f[2] != "4294967295" {
		t.Skip("this needs root of the machine: a user namespace of one user has no other users")
	}
}
