package testkit

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// recorder is a test that keeps what it is told, and fails only there.
type recorder struct {
	testing.TB
	cleanups []func()
	said     string
}

func (r *recorder) Helper()                   {}
func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Logf(string, ...any)       {}
func (r *recorder) Errorf(f string, a ...any) { r.said += fmt.Sprintf(f, a...) }
func (r *recorder) Fatalf(f string, a ...any) { r.said += fmt.Sprintf(f, a...); runtime.Goexit() }

// run calls f as a test would, and returns what it said.
func (r *recorder) run(f func()) string {
	over := make(chan struct{})
	go func() { defer close(over); f() }()
	<-over
	return r.said
}

func TestMain(m *testing.M) { Main(m) }

// TestCheckLeaks: what is given back a little late is no leak; what is not is named.
func TestCheckLeaks(t *testing.T) {
	late := &recorder{TB: t}
	CheckLeaks(late)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	go func() {
		<-stop
		Pace(50 * time.Millisecond)
		r.Close()
		w.Close()
	}()
	close(stop)
	late.cleanups[0]()
	if late.said != "" {
		t.Errorf("a file that is closed late: %s", late.said)
	}
	leaky := &recorder{TB: t}
	CheckLeaks(leaky)
	name := t.TempDir() + "/leaked"
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make(chan struct{})
	defer close(block)
	go func() { <-block }()
	leakPatience = 100 * time.Millisecond
	defer func() { leakPatience = Patience }()
	leaky.cleanups[0]()
	if !strings.Contains(leaky.said, name) || !strings.Contains(leaky.said, "TestCheckLeaks.func") {
		t.Errorf("a leak of a file and a goroutine: %q", leaky.said)
	}
}

func TestEventually(t *testing.T) {
	n := 0
	Eventually(t, "the third look", func() bool { n++; return n == 3 })
	if n != 3 {
		t.Errorf("%d looks", n)
	}
}

// TestEventuallyEnds: what does not happen ends the test after its time, and is named.
func TestEventuallyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, begin := &recorder{TB: t}, time.Now()
		said := r.run(func() { Eventually(r, "the rain", func() bool { return false }); t.Error("it went on") })
		if d := time.Since(begin); said != "waited 30s for the rain" || d < Patience || d > Patience+time.Second {
			t.Errorf("%q after %v", said, d)
		}
	})
}

// TestTries: what goes well once is enough; what never does is reported once, with the last reason.
func TestTries(t *testing.T) {
	n := 0
	Tries(t, "the third time", func() error {
		if n++; n < 3 {
			return errors.New("not yet")
		}
		return nil
	})
	r, asked := &recorder{TB: t}, 0
	Tries(r, "rain", func() error { asked++; return fmt.Errorf("dry %d", asked) })
	if n != 3 || asked != 5 || r.said != "rain: dry 5; no try of 5 went well" {
		t.Errorf("%d and %d tries, %q", n, asked, r.said)
	}
}

// TestHasLocalRoutes: one address without a route is enough, and addresses of IPv4 do not count.
func TestHasLocalRoutes(t *testing.T) {
	const addrs = "    inet 127.0.0.1/8 scope host lo\n    inet6 ::1/128 scope host\n    inet6 2001:db8::7/128 scope global\n"
	const lo = "local ::1 dev lo table local proto kernel metric 0 pref medium\n"
	for routes, want := range map[string]bool{
		lo: false, lo + "2001:db8::7 dev lo proto kernel metric 256\n": false,
		lo + "local 2001:db8::7 dev lo table local\n": true,
	} {
		if HasLocalRoutes(addrs, routes) != want {
			t.Errorf("%q: want %v", routes, want)
		}
	}
}

// TestNever: what must not happen ends the test at once; where it does not happen the test goes on after the time.
func TestNever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, begin := &recorder{TB: t}, time.Now()
		Never(r, time.Minute, "it rained", func() bool { return false })
		if d := time.Since(begin); d < time.Minute || r.said != "" {
			t.Errorf("%q after %v", r.said, d)
		}
		rain := time.Now().Add(time.Second)
		said := r.run(func() {
			Never(r, time.Minute, "it rained", func() bool { return time.Now().After(rain) })
			t.Error("it went on")
		})
		if d := time.Since(rain); !strings.HasSuffix(said, ": it rained") || d > time.Second {
			t.Errorf("%q %v later", said, d)
		}
	})
}

// TestAdvance: what is due at the end of the time is done when Advance returns.
func TestAdvance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var done atomic.Bool
		time.AfterFunc(time.Hour, func() { done.Store(true) })
		Advance(time.Hour - 1)
		if done.Load() {
			t.Error("too early")
		}
		Advance(1)
		if !done.Load() {
			t.Error("not yet done")
		}
	})
}

func TestAwaitFiles(t *testing.T) {
	before := CountFiles(t)
	f, err := os.Create(t.TempDir() + "/late")
	if err != nil {
		t.Fatal(err)
	}
	leakPatience = 100 * time.Millisecond
	r := &recorder{TB: t}
	AwaitFiles(r, before)
	leakPatience = Patience
	if !strings.Contains(r.said, f.Name()) {
		t.Errorf("an open file is not named: %q", r.said)
	}
	go func() {
		Pace(20 * time.Millisecond)
		f.Close()
	}()
	AwaitFiles(t, before)
}

// TestUntilSpares: the longer a check takes, the longer is the pause after it, but not so long that its success would be noticed
// much later.
func TestUntilSpares(t *testing.T) {
	for _, tt := range []struct {
		cost time.Duration
		want int
	}{
		{0, 1001}, {10 * time.Millisecond, 26}, {50 * time.Millisecond, 8}, {250 * time.Millisecond, 3},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := 0
			Until(time.Second, func() bool { n++; Pace(tt.cost); return false })
			if n < tt.want || n > tt.want+1 {
				t.Errorf("a check that takes %v was made %d times in a second, not %d", tt.cost, n, tt.want)
			}
		})
	}
}
