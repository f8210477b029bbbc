package testkit

import (
	"fmt"
	"os"
	"strings"
	"testing"
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
		time.Sleep(50 * time.Millisecond)
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
