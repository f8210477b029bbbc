package relay

import (
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// dialer stands for what had the socket first: a dial on the same loop.
type dialer struct{ loop.Node }

func (d *dialer) Turn() bool { d.Got &^= loop.In | loop.Out; return false }
func (d *dialer) Shutdown()  {}

// TestAdopted: a socket that the loop watches already is not registered again, and what came before the relay had it, even
// before the app's handshake was over, is passed on: here all of it, and the FIN.
func TestAdopted(t *testing.T) {
	l := newLoop(t)
	fd, up := tcpPair(t)
	d := &dialer{}
	d.Init(d)
	do := func(f func()) {
		t.Helper()
		done := make(chan struct{})
		l.Post(func() { f(); close(done) })
		select {
		case <-done:
		case <-time.After(testkit.Patience):
			t.Fatal("the loop does not run")
		}
	}
	do(func() {
		if err := l.Watch(&d.Node, fd, loop.Stream); err != nil {
			t.Error(err)
		}
	})
	if _, err := up.Write([]byte("220 hello")); err != nil {
		t.Fatal(err)
	}
	up.CloseWrite()
	for range 20 { // the dial gets all events
		do(func() {})
		testkit.Pace(time.Millisecond)
	}
	s := newStream()
	f := &flowOf{app: s, up: up, done: make(chan Result, 1)}
	do(func() {
		f.Relay = l.Start(&fakeRequest{s: s}, l.HandOver(&d.Node, fd), func(r Result) { f.done <- r })
		if n := l.Watched(); n != 1 {
			t.Errorf("%d sockets are watched", n)
		}
	})
	s.sendFIN()
	if r := f.result(t); r.Err != nil || r.Down != 9 {
		t.Errorf("%+v", r)
	}
}
