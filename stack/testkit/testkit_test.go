package testkit

import (
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
