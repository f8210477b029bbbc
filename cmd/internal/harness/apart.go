package harness

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// envApart holds the name of the one test that a process made by Apart runs.
const envApart = "HARNESS_APART"

// Apart runs the calling test beside others of its kind, in a process that has namespaces of its own according to flags
// (CLONE_NEW…). It returns true in that process, where the test is to do its work, and false in the process that only waits
// for it. why is the variable with the reason why the tests cannot run: see Reenter.
//
// This is for tests that spend most of their time waiting. A test that measures time or the CPU belongs with those that run one
// after the other.
func Apart(t *testing.T, why string, flags uintptr) bool {
	t.Helper()
	return (*Queue)(nil).Apart(t, why, flags)
}

// Apart is the function Apart in the order of the queue.
func (q *Queue) Apart(t *testing.T, why string, flags uintptr) bool {
	t.Helper()
	if os.Getenv(envApart) == t.Name() {
		return true
	} else if os.Getenv(envApart) != "" {
		t.Skip("another test runs in this process")
	}
	if reason := os.Getenv(why); reason != "" {
		t.Skip(reason)
	}
	if testing.Short() {
		t.Skip("namespaces of its own are not short")
	}
	t.Parallel()
	defer q.take(t.Name())()
	pattern := "^" + strings.ReplaceAll(regexp.QuoteMeta(t.Name()), "/", "$/^") + "$"
	cmd := exec.Command("/proc/self/exe", "-test.run="+pattern, "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), envApart+"="+t.Name())
	runtime.LockOSThread() // Pdeathsig follows the thread that forks
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
	began := time.Now()
	out, err := cmd.CombinedOutput()
	if s := cmd.ProcessState; s != nil { // whether a test waits or computes says how many of them can run at once
		out = fmt.Appendf(out, "%s ran apart for %.1f s and used %.1f s of the processors\n",
			t.Name(), time.Since(began).Seconds(), (s.UserTime() + s.SystemTime()).Seconds())
	}
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
