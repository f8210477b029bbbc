// Package testkit is what the tests of all layers share: waiting for a condition, and looking for goroutines and file descriptors
// that a test left behind. Only tests import it.
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

// poll is the time between two looks at a condition.
const poll = 2 * time.Millisecond

// leakPatience is Patience but in the test of CheckLeaks.
var leakPatience = Patience

// Eventually waits until ok reports true. After Patience it ends the test and says what it waited for. It is called on the
// goroutine of the test.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !ok(); time.Sleep(poll) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", Patience, what)
		}
	}
}

// runtimeFiles opens what the runtime keeps once it has a poller, so that no test is blamed for it.
var runtimeFiles = sync.OnceFunc(func() {
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		_ = l.Close()
	} else if r, w, err := os.Pipe(); err == nil { // there is no network
		_, _ = r.Close(), w.Close()
	}
})

// Files lists what the open file descriptors of this process are, as /proc names them: for a message.
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

// CountFiles is the number of open file descriptors, those of the runtime's poller included from the first call on.
func CountFiles(t testing.TB) int { t.Helper(); return len(Files(t)) }

// CheckLeaks fails the test if, when it is over, there are goroutines that were not there when CheckLeaks was called, or more
// open files. It comes first in a test: its look is then the last thing that the test does.
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
				t.Errorf("%d files were open before: %q\nand %d after: %q\ngoroutines: %v", len(before), before, len(after), after, err)
				return
			}
		}
	})
}

// Main runs the tests of a package and then looks for goroutines that are left, after some time to end. It does not return.
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
