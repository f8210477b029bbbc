package socks

import (
	"context"
	"sync"
	"testing"

	"github.com/viasocks/viasocks/stack/loop"
)

// runs is the loops of the tests' Dialers.
var runs sync.Map // *Dialer to *testRun

type testRun struct {
	l    *loop.Loop
	over chan struct{}
}

// newDialer gives a Dialer with a loop that runs. When the test ends both are closed.
func newDialer(t testing.TB, o Options) *Dialer {
	t.Helper()
	d, err := NewDialer(o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	r := &testRun{l, make(chan struct{})}
	go func() { _ = l.Run(context.Background()); close(r.over) }()
	runs.Store(d, r)
	t.Cleanup(func() {
		end(d)
		runs.Delete(d)
		if s := d.Stats(); s != (Stats{}) {
			t.Errorf("after Close: %+v", s)
		}
	})
	return d
}

// on is the loop of d.
func on(d *Dialer) *loop.Loop {
	r, _ := runs.Load(d)
	return r.(*testRun).l
}

// end closes d's loop, waits for its end, and closes d.
func end(d *Dialer) {
	r, _ := runs.Load(d)
	r.(*testRun).l.Close()
	<-r.(*testRun).over
	d.Close()
}
