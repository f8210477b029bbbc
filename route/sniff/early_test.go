package sniff

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// app is the program's side: the request, and the stream once it is accepted.
type app struct {
	mu             sync.Mutex
	l              flow.Listener
	gone           bool // it gave up before the handshake was over
	up             []byte
	fin, reset     bool
	aborts, closes int
	rejected       int
}

func (a *app) Flow() flow.Flow     { return flow.Flow{ID: 7} }
func (a *app) OnCancel(func())     {}
func (a *app) Reject(flow.Refusal) { a.mu.Lock(); a.rejected++; a.mu.Unlock() }

func (a *app) Accept(l flow.Listener) {
	a.l = l
	if a.gone {
		go l.Opened(nil, errors.New("RST"))
		return
	}
	go l.Opened(a, nil)
}

func (a *app) do(f func(), ev flow.Events) {
	a.mu.Lock()
	f()
	a.mu.Unlock()
	a.l.Ready(ev)
}

func (a *app) say(s string) { a.do(func() { a.up = append(a.up, s...) }, flow.Readable) }
func (a *app) close()       { a.do(func() { a.fin = true }, flow.Readable) }
func (a *app) rst()         { a.do(func() { a.reset = true }, flow.Hup) }

func (a *app) ended() (aborted, closed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.aborts > 0, a.closes > 0
}

func (a *app) ReadTo(w io.Writer) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.reset || a.aborts > 0:
		return 0, flow.ErrReset
	case len(a.up) == 0 && a.fin:
		return 0, io.EOF
	case len(a.up) == 0:
		return 0, flow.ErrAgain
	}
	n, _ := w.Write(a.up)
	a.up = a.up[n:]
	return n, nil
}

func (a *app) WriteFrom(flow.Payload) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.reset || a.aborts > 0 {
		return 0, flow.ErrReset
	}
	return 0, flow.ErrAgain
}
func (a *app) CloseWrite() error { return nil }
func (a *app) Abort()            { a.mu.Lock(); a.aborts++; a.mu.Unlock() }
func (a *app) Close() error      { a.mu.Lock(); a.closes++; a.mu.Unlock(); return nil }

// taker is the listener that the stream goes to.
type taker struct {
	opened chan flow.Stream
	err    atomic.Pointer[error]
	events atomic.Uint32
}

func newTaker() *taker { return &taker{opened: make(chan flow.Stream, 10)} }

func (k *taker) Opened(s flow.Stream, err error) {
	if err != nil {
		k.err.Store(&err)
	}
	k.opened <- s
}
func (k *taker) Ready(ev flow.Events) { k.events.Or(uint32(ev)) }

type answer struct {
	e    *Early
	name string
	err  error
}

type rig struct {
	t     *testing.T
	l     *loop.Loop
	bytes atomic.Int64
	done  chan answer
}

// newRig runs a loop until the end of the test, and then looks for what was left.
func newRig(t *testing.T) *rig {
	t.Helper()
	testkit.CheckLeaks(t)
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	g := &rig{t: t, l: l, done: make(chan answer, 10)}
	over := make(chan struct{})
	go func() { _ = l.Run(context.Background()); close(over) }()
	t.Cleanup(func() {
		l.Close()
		<-over
		if n := g.bytes.Load(); n != 0 {
			t.Errorf("%d bytes are said to be held", n)
		}
	})
	return g
}

func (g *rig) start(a *app, wait time.Duration) *Early {
	return Start(g.l, a, wait, &g.bytes, func(e *Early, name string, err error) { g.done <- answer{e, name, err} })
}

func (g *rig) answer() answer {
	g.t.Helper()
	select {
	case x := <-g.done:
		return x
	case <-time.After(testkit.Patience):
		g.t.Fatal("done was not called")
		return answer{}
	}
}

// readAll reads a stream until it has nothing, or ends.
func readAll(s flow.Stream) (string, error) {
	var b strings.Builder
	for {
		if _, err := s.ReadTo(&b); err != nil {
			return b.String(), err
		}
	}
}

const get = "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"

// What was read comes first, then what follows, then FIN, in whatever pieces the program sends it.
func TestEarlyNamed(t *testing.T) {
	g := newRig(t)
	a := &app{}
	e := g.start(a, time.Hour)
	for _, c := range get {
		a.say(string(c))
	}
	x := g.answer()
	if x.name != "a.example" || x.err != nil || x.e != e || e.Flow().ID != 7 {
		t.Fatalf("%+v", x)
	}
	a.say("more")
	k := newTaker()
	e.OnCancel(func() { t.Error("cancelled") })
	e.Accept(k)
	s := <-k.opened
	if got, err := readAll(s); got != get+"more" || !errors.Is(err, flow.ErrAgain) {
		t.Errorf("%q, %v", got, err)
	}
	a.close()
	testkit.Eventually(t, "the hint", func() bool { return k.events.Load()&uint32(flow.Readable) != 0 })
	if got, err := readAll(s); got != "" || err != io.EOF {
		t.Errorf("at the end: %q, %v", got, err)
	}
	a.rst()
	testkit.Eventually(t, "the hint of RST", func() bool { return k.events.Load()&uint32(flow.Hup) != 0 })
	s.Close()
	e.Accept(newTaker()) // only the first counts
	e.Reject(flow.RefuseReset)
	e.Abort()
	g.l.Post(func() {})
	if aborted, closed := a.ended(); aborted || !closed {
		t.Errorf("aborted %v, closed %v", aborted, closed)
	}
}

// A program that waits for its server is let go when the time is over, one that half-closes at once.
func TestEarlyNameless(t *testing.T) {
	g := newRig(t)
	for what, row := range map[string]struct {
		wait time.Duration
		do   func(*app)
		want string
	}{
		"silence":      {20 * time.Millisecond, func(*app) {}, ""},
		"half a head":  {20 * time.Millisecond, func(a *app) { a.say(get[:20]) }, get[:20]},
		"FIN":          {time.Hour, func(a *app) { a.close() }, ""},
		"half and FIN": {time.Hour, func(a *app) { a.say(get[:20]); a.close() }, get[:20]},
		"not HTTP":     {time.Hour, func(a *app) { a.say("SSH-2.0-x\r\n") }, "SSH-2.0-x\r\n"},
		"too long": {time.Hour, func(a *app) { a.say("GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 2*MaxBytes)) },
			"GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 2*MaxBytes)},
	} {
		a := &app{}
		e := g.start(a, row.wait)
		start := time.Now()
		row.do(a)
		x := g.answer()
		if x.name != "" || x.err != nil {
			t.Fatalf("%s: %+v", what, x)
		}
		if row.wait < time.Hour && time.Since(start) < row.wait {
			t.Errorf("%s: after %v", what, time.Since(start))
		}
		if n := g.bytes.Load(); n > MaxBytes {
			t.Errorf("%s: %d bytes are held", what, n)
		}
		k := newTaker()
		e.Accept(k)
		s := <-k.opened
		if got, err := readAll(s); got != row.want || (err == io.EOF) != a.fin {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
		s.Close()
	}
}

// A program that goes away is told once: to done before the name is known, to the function of OnCancel after it.
func TestEarlyGone(t *testing.T) {
	g := newRig(t)
	g.start(&app{gone: true}, time.Hour)
	if x := g.answer(); !errors.Is(x.err, ErrAppGone) {
		t.Errorf("gone before the handshake: %+v", x)
	}
	a := &app{}
	g.start(a, time.Hour)
	a.say(get[:5])
	testkit.Eventually(t, "the first bytes to be read", func() bool { return g.bytes.Load() == 5 })
	a.rst()
	if x := g.answer(); !errors.Is(x.err, ErrAppGone) {
		t.Errorf("RST while it is read: %+v", x)
	}
	for _, late := range []bool{false, true} {
		a := &app{}
		e := g.start(a, time.Hour)
		a.say(get)
		g.answer()
		var told atomic.Int32
		if !late {
			e.OnCancel(func() { told.Add(1) })
		}
		a.rst()
		testkit.Eventually(t, "the end of the stream", func() bool { aborted, closed := a.ended(); return aborted && closed })
		if late {
			e.OnCancel(func() { told.Add(1) })
		}
		testkit.Eventually(t, "the cancellation", func() bool { return told.Load() > 0 })
		k := newTaker()
		e.Accept(k)
		if s := <-k.opened; s != nil || k.err.Load() == nil || told.Load() != 1 {
			t.Errorf("accepted after the end: %v, told %d times", s, told.Load())
		}
	}
}

func TestEarlyRejected(t *testing.T) {
	g := newRig(t)
	a := &app{}
	e := g.start(a, time.Hour)
	e.OnCancel(func() { t.Error("cancelled") })
	a.say(get)
	g.answer()
	e.Reject(flow.RefuseSilent)
	testkit.Eventually(t, "RST", func() bool { aborted, closed := a.ended(); return aborted && closed })
	b := &app{}
	e = g.start(b, time.Hour)
	testkit.Eventually(t, "the handshake", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.l != nil })
	e.Abort()
	if x := g.answer(); !errors.Is(x.err, loop.ErrClosed) {
		t.Errorf("aborted: %+v", x)
	}
}

// The end of the loop ends all of it, in whatever phase.
func TestEarlyLoopCloses(t *testing.T) {
	g := newRig(t)
	reads, holds, has := &app{}, &app{}, &app{}
	g.start(reads, time.Hour)
	reads.say(get[:5])
	testkit.Eventually(t, "the first bytes to be read", func() bool { return g.bytes.Load() == 5 })
	e := g.start(holds, time.Hour)
	holds.say(get)
	g.answer()
	var told atomic.Int32
	e.OnCancel(func() { told.Add(1) })
	has.up = []byte(get)
	given := g.start(has, time.Hour)
	g.answer()
	k := newTaker()
	given.Accept(k)
	s := <-k.opened
	g.l.Close()
	if x := g.answer(); !errors.Is(x.err, loop.ErrClosed) {
		t.Errorf("while it is read: %+v", x)
	}
	testkit.Eventually(t, "the loop's end", g.l.Gone)
	testkit.Eventually(t, "the cancellation", func() bool { return told.Load() == 1 })
	late := newTaker()
	e.Accept(late)
	if s := <-late.opened; s != nil {
		t.Error("a stream of a loop that is closed")
	}
	for what, a := range map[string]*app{"reads": reads, "holds": holds} {
		if aborted, closed := a.ended(); !aborted || !closed {
			t.Errorf("%s: aborted %v, closed %v", what, aborted, closed)
		}
	}
	if got, _ := readAll(s); got != get { // it is the taker's
		t.Errorf("the taker reads %q", got)
	}
	s.Close()
	a := &app{}
	g.start(a, time.Hour)
	if x := g.answer(); !errors.Is(x.err, loop.ErrClosed) || a.rejected != 1 {
		t.Errorf("on a closed loop: %+v", x)
	}
}
