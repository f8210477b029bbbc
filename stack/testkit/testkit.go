// Package testkit is shared by the tests of all layers. It waits for conditions, and finds goroutines and file
// descriptors that a test has left behind. Only tests import it.
package testkit

import (
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Patience is how long a test waits for what must happen, on a machine that may stall for seconds.
const Patience = 20 * time.Second

// poll is the time between two checks of a condition.
const poll = 2 * time.Millisecond

// leakPatience equals Patience, except in the test of CheckLeaks.
var leakPatience = Patience

// Eventually waits until ok returns true. After Patience it ends the test and reports what it waited for. It must be
// called on the goroutine of the test.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !ok(); time.Sleep(poll) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", Patience, what)
		}
	}
}

// runtimeFiles opens the files that the runtime keeps once it has a poller, so that no test is blamed for them.
var runtimeFiles = sync.OnceFunc(func() {
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		_ = l.Close()
	} else if r, w, err := os.Pipe(); err == nil { // there is no network
		_, _ = r.Close(), w.Close()
	}
})

// Files lists the open file descriptors of this process, as /proc names them, for a message.
func Files(t testing.TB) (files []string) {
	t.Helper()
	runtimeFiles()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatalf("cannot count the open files: %v", err)
	}
	for _, e := range d {
		to, _ := os.Readlink("/proc/self/fd/" + e.Name())
		files = append(files, to)
	}
	return files
}

// CountFiles returns the number of open file descriptors. From the first call on it includes those of the runtime's
// poller.
func CountFiles(t testing.TB) int { t.Helper(); return len(Files(t)) }

// CheckLeaks fails the test if, when it is over, there are goroutines that did not exist when CheckLeaks was called,
// or more open files. Call it first in a test: its check is then the last thing that the test does.
func CheckLeaks(t testing.TB) {
	t.Helper()
	before, others := Files(t), goleak.IgnoreCurrent()
	t.Cleanup(func() {
		for end := time.Now().Add(leakPatience); ; time.Sleep(poll) {
			err, after := goleak.Find(others), Files(t)
			if err == nil && len(after) <= len(before) {
				return
			}
			if time.Now().After(end) {
				t.Errorf(
					"%d files were open before: %q\nand %d after: %q\ngoroutines: %v",
					len(before),
					before,
					len(after),
					after,
					err,
				)
				return
			}
		}
	})
}

// Main runs the tests of a package and then checks that all goroutines end within some time. It does not return.
func Main(m *testing.M) {
	runtimeFiles()
	goleak.VerifyTestMain(settled{m})
}

type settled struct{ m *testing.M }

// Run implements goleak.TestingM.
func (s settled) Run() int {
	code := s.m.Run()
	for end := time.Now().Add(Patience); goleak.Find() != nil && time.Now().Before(end); {
		time.Sleep(poll)
	}
	return code
}
