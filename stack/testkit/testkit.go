// Package testkit is shared by the tests of all layers. It waits for conditions, and finds goroutines and file
// descriptors that a test has left behind. Only tests import it.
package testkit

import (
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

// Patience is how long a test waits for what must happen, on a machine that may stall for seconds.
const Patience = 30 * time.Second

// poll is the least time between two checks of a condition. Where checks start programs, several tests that wait beside each
// other would use the processors up. Until therefore waits three times as long as the last check took, but for this no longer
// than rarely, and in any case as long as the check took.
const poll, rarely = time.Millisecond, 100 * time.Millisecond

// leakPatience equals Patience, except in the test of CheckLeaks.
var leakPatience = Patience

// Eventually waits until ok returns true. After Patience it ends the test and reports what it waited for. It must be
// called on the goroutine of the test.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	EventuallyIn(t, Patience, what, ok)
}

// EventuallyIn is Eventually for what may take longer than Patience, and for what must not take as long.
func EventuallyIn(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	if !Until(d, ok) {
		t.Fatalf("waited %v for %s", d, what)
	}
}

// Until waits until ok returns true, and returns false if that does not happen within d. It is for goroutines other
// than that of the test, and for tests that say more about a failure than Eventually does.
func Until(d time.Duration, ok func() bool) bool {
	for end := time.Now().Add(d); ; {
		start := time.Now()
		if ok() {
			return true
		} else if start.After(end) {
			return false
		}
		cost := time.Since(start)
		time.Sleep(max(poll, cost, min(3*cost, rarely)))
	}
}

// Never ends the test as soon as happened returns true within d. It must be called on the goroutine of the test.
func Never(t testing.TB, d time.Duration, what string, happened func() bool) {
	t.Helper()
	if start := time.Now(); Until(d, happened) {
		t.Fatalf("after %v: %s", time.Since(start).Round(time.Millisecond), what)
	}
}

// most is how often Tries tries.
const most = 5

// Tries calls f until it returns nil, and fails the test after five errors. It is for what must be fast: a machine that stalls
// just then can spoil a try, but not all of them.
func Tries(t testing.TB, what string, f func() error) {
	t.Helper()
	for n := 1; ; n++ {
		err := f()
		if err == nil {
			return
		} else if n == most {
			t.Errorf("%s: %v; no try of %d went well", what, err, most)
			return
		}
		t.Logf("%s: %v", what, err)
	}
}

// HasLocalRoutes reports whether the kernel has a route for each IPv6 address of its own: it makes them from a work queue, some
// time after the address. addrs is what `ip addr` prints, and routes is what `ip -6 route show table all` does.
func HasLocalRoutes(addrs, routes string) bool {
	f := strings.Fields(addrs)
	for i, word := range f {
		a, _, ok := strings.Cut(f[min(i+1, len(f)-1)], "/")
		if word == "inet6" && ok && !strings.Contains(routes, "local "+a+" dev") {
			return false
		}
	}
	return true
}

// Pace lets d pass because the time is an input of the test: the speed of a load, a slow peer, an age that something
// must reach. Say in a comment what it is where the code does not show it.
func Pace(d time.Duration) { time.Sleep(d) }

// Settle lets d pass for what no test can see, such as that another goroutine has begun to wait in a system call. A
// test that goes on too early tests less, but still passes. What it waits for belongs in why.
func Settle(d time.Duration, why string) {
	time.Sleep(d)
}

// Advance moves the clock of a synctest bubble on by d, which takes no real time, and waits until all goroutines of
// the bubble have done what was due. Outside of a bubble it panics.
func Advance(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
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

// AwaitFiles waits until at most n files are open, and fails the test if that does not happen.
func AwaitFiles(t testing.TB, n int) {
	t.Helper()
	if !Until(leakPatience, func() bool { return CountFiles(t) <= n }) {
		files := Files(t)
		t.Errorf("%d files are open, want at most %d: %q", len(files), n, files)
	}
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
		var err error
		var after []string
		if !Until(leakPatience, func() bool {
			err, after = goleak.Find(others), Files(t)
			return err == nil && len(after) <= len(before)
		}) {
			t.Errorf("%d files were open before: %q\nand %d after: %q\ngoroutines: %v",
				len(before), before, len(after), after, err)
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
	Until(Patience, func() bool { return goleak.Find() == nil })
	return code
}
