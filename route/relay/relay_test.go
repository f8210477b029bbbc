package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

func pattern(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func TestBothWaysAndFIN(t *testing.T) {
	for _, first := range []string{"app", "upstream"} {
		t.Run(first+" first", func(t *testing.T) {
			f := startFlow(t, newLoop(t))
			f.app.send([]byte("hello "), []byte("upstream"))
			if got := f.read(t, 14); string(got) != "hello upstream" {
				t.Fatalf("got %q", got)
			}
			f.up.Write([]byte("hello app"))
			if got := f.app.take(t, 9); string(got) != "hello app" {
				t.Fatalf("got %q", got)
			}
			appFIN := func() { f.app.sendFIN(); f.wantEnd(t, false) }
			upFIN := func() {
				f.up.CloseWrite()
				f.app.wait(t, "FIN", func() bool { return f.app.outFIN })
			}
			// After the first FIN the other direction goes on.
			if first == "app" {
				appFIN()
				f.running(t)
				f.up.Write([]byte("later"))
				if got := f.app.take(t, 5); string(got) != "later" {
					t.Fatalf("got %q", got)
				}
				upFIN()
			} else {
				upFIN()
				f.running(t)
				f.app.send([]byte("later"))
				if got := f.read(t, 5); string(got) != "later" {
					t.Fatalf("got %q", got)
				}
				appFIN()
			}
			r := f.result(t)
			if r.Err != nil {
				t.Errorf("err %v", r.Err)
			}
			if _, aborted, _ := f.app.state(); aborted {
				t.Error("the app got RST for FIN")
			}
			up, down := f.Bytes()
			if r.Up != up || r.Down != down || up+down != 14+9+5 {
				t.Errorf("counted %d up, %d down; result %+v", up, down, r)
			}
		})
	}
}

// TestEarlyData: what either side sent before the relay began is not lost, and a FIN behind it neither.
func TestEarlyData(t *testing.T) {
	l := newLoop(t)
	fd, peer := tcpPair(t)
	peer.Write([]byte("220 ready"))
	peer.CloseWrite()
	s := newStream()
	s.in = [][]byte{[]byte("GET"), bytes.Repeat([]byte("x"), gatherBelow), []byte("end")}
	s.fin = true
	f := &flowOf{app: s, up: peer, done: make(chan Result, 2)}
	f.Relay = l.Start(&fakeRequest{s: s}, loop.Unwatched(fd), func(r Result) { f.done <- r })
	if got := s.take(t, 9); string(got) != "220 ready" {
		t.Fatalf("got %q", got)
	}
	got, err := io.ReadAll(peer)
	if err != nil || len(got) != 6+gatherBelow || !bytes.HasPrefix(got, []byte("GETxx")) ||
		!bytes.HasSuffix(got, []byte("xxend")) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	if r := f.result(t); r.Err != nil {
		t.Error(r.Err)
	}
}

func TestAppGone(t *testing.T) {
	l := newLoop(t)
	fd, peer := tcpPair(t)
	s := newStream()
	s.closed = 1
	f := &flowOf{app: s, up: peer, done: make(chan Result, 2)}
	f.Relay = l.Start(&fakeRequest{err: errors.New("gave up")}, loop.Unwatched(fd), func(r Result) { f.done <- r })
	if r := f.result(t); !errors.Is(r.Err, ErrAppGone) {
		t.Errorf("%+v", r)
	}
	f.wantEnd(t, true)
}

func TestAbort(t *testing.T) {
	f := startFlow(t, newLoop(t))
	f.Abort()
	if r := f.result(t); !errors.Is(r.Err, ErrAborted) {
		t.Errorf("%+v", r)
	}
	f.wantEnd(t, true)
	f.Abort()
	f.Ready(flow.Readable | flow.Writable | flow.Hup)
}

// TestAbortBeforeOpened: the stream that comes later is reset.
func TestAbortBeforeOpened(t *testing.T) {
	l := newLoop(t)
	fd, peer := tcpPair(t)
	q := &fakeRequest{s: newStream(), hold: true}
	done := make(chan Result, 2)
	l.Start(q, loop.Unwatched(fd), func(r Result) { done <- r }).Abort()
	if r := <-done; !errors.Is(r.Err, ErrAborted) {
		t.Errorf("%+v", r)
	}
	q.open()
	q.s.wait(t, "close", func() bool { return q.s.closed == 1 && q.s.aborted })
	peer.Close()
}

// TestLost: a stream that did not take what it read ends the flow by RST.
func TestLost(t *testing.T) {
	s := newStream()
	s.lie = 1
	f := startWith(t, newLoop(t), s, nil)
	f.up.Write([]byte("xyz"))
	if r := f.result(t); !errors.Is(r.Err, ErrLost) {
		t.Errorf("%+v", r)
	}
	f.wantEnd(t, true)
}

func TestLoopClosed(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := NewLoop(Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- l.Run(context.Background()) }()
	runs := make(chan bool)
	l.do(func() { close(runs) })
	<-runs
	var flows []*flowOf
	for range 20 {
		flows = append(flows, startFlow(t, l))
	}
	fd, _ := tcpPair(t)
	q := &fakeRequest{s: newStream(), hold: true} // not opened yet
	late := make(chan Result, 2)
	l.Start(q, loop.Unwatched(fd), func(r Result) { late <- r })
	flows[0].app.wait(t, "stream", func() bool { return flows[0].app.l != nil })
	l.Close()
	l.Close()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	for _, f := range flows {
		if r := f.result(t); !errors.Is(r.Err, ErrClosed) {
			t.Errorf("%+v", r)
		}
		f.wantEnd(t, true)
	}
	if r := <-late; !errors.Is(r.Err, ErrClosed) {
		t.Errorf("%+v", r)
	}
	q.open()
	q.s.wait(t, "close", func() bool { return q.s.closed == 1 && q.s.aborted })

	fd, _ = tcpPair(t)
	q = &fakeRequest{s: newStream()}
	r := l.Start(q, loop.Unwatched(fd), func(r Result) { late <- r })
	if r := <-late; !errors.Is(r.Err, ErrClosed) {
		t.Errorf("%+v", r)
	}
	if len(q.reject) != 1 || q.l != nil {
		t.Error("the SYN was not refused")
	}
	r.Abort()
	if err := l.Run(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("second Run: %v", err)
	}
}

// TestCloseWithoutRun gives everything back too.
func TestCloseWithoutRun(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := NewLoop(Config{})
	if err != nil {
		t.Fatal(err)
	}
	f := startFlow(t, l)
	l.Close()
	if r := f.result(t); !errors.Is(r.Err, ErrClosed) {
		t.Errorf("%+v", r)
	}
}

// TestBackPressure: a side that does not read holds a bounded amount, and gets everything in the end.
func TestBackPressure(t *testing.T) {
	data := pattern(24 << 20)
	t.Run("app", func(t *testing.T) {
		s := newStream()
		s.room = 100000
		f := startWith(t, newLoop(t), s, nil)
		go func() { f.up.Write(data); f.up.CloseWrite() }()
		s.wait(t, "full stream", func() bool { return s.full })
		f.running(t)
		var got []byte
		for len(got) < len(data) {
			got = append(got, s.take(t, min(50000, len(data)-len(got)))...)
		}
		if !bytes.Equal(got, data) {
			t.Error("data differs")
		}
		s.wait(t, "FIN", func() bool { return s.outFIN })
		if r := f.l.spilled(f.Relay); r != 0 {
			t.Errorf("%d bytes held", r)
		}
	})
	t.Run("upstream", func(t *testing.T) {
		f := startFlow(t, newLoop(t))
		for i, n := 0, 0; i < len(data); i += n {
			n = min([]int{1, 100, 1448, 8000, 9000, 60000}[rand.IntN(6)], len(data)-i)
			f.app.mu.Lock()
			f.app.in = append(f.app.in, data[i:i+n])
			f.app.mu.Unlock()
		}
		f.app.sendFIN()
		f.running(t)
		if n := f.l.spilled(f.Relay); n > gatherCap {
			t.Errorf("%d bytes held", n)
		}
		got, err := io.ReadAll(f.up)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
		if n := f.l.spilled(f.Relay); n != 0 {
			t.Errorf("%d bytes still held", n)
		}
	})
}

// spilled asks on the loop, where the field belongs.
func (l *Loop) spilled(r *Relay) int {
	n := make(chan int)
	l.do(func() { n <- len(r.spill) })
	return <-n
}

// do runs f on the loop.
func (l *Loop) do(f func()) {
	p := &probe{f: f}
	p.Init(p)
	l.Note(&p.Node, appIn)
}

type probe struct {
	loop.Node
	f func()
}

func (p *probe) Turn() bool { p.f(); return false }
func (p *probe) Shutdown()  {}

// TestManyFlows: 1,000 at once, each with its own data both ways, echoed by the upstream.
func TestManyFlows(t *testing.T) {
	const flows, size = 1000, 20000
	l := newLoop(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	data := pattern(size + flows)
	var wg sync.WaitGroup
	for i := range flows {
		fd, peer := tcpPairOn(t, ln)
		f := &flowOf{app: newStream(), up: peer, done: make(chan Result, 2)}
		f.Relay = l.Start(&fakeRequest{s: f.app}, loop.Unwatched(fd), func(r Result) { f.done <- r })
		wg.Go(func() {
			echo(peer)
			peer.CloseWrite()
		})
		wg.Go(func() {
			mine := data[i : i+size]
			for j := 0; j < size; j += 1000 {
				f.app.send(mine[j : j+1000])
			}
			f.app.sendFIN()
			if got := f.app.take(t, size); !bytes.Equal(got, mine) {
				t.Error("data differs")
			}
			if r := f.result(t); r.Err != nil || r.Up != size || r.Down != size {
				t.Errorf("%+v", r)
			}
		})
	}
	wg.Wait()
}

// TestIdleCosts: an idle relay is its struct and a slot: no goroutine, no buffer.
func TestIdleCosts(t *testing.T) {
	const flows = 1001
	l := newLoop(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var keep []*flowOf
	fds := make([]int, flows)
	for i := range flows {
		fd, peer := tcpPairOn(t, ln)
		fds[i] = fd
		keep = append(keep, &flowOf{app: newStream(), up: peer})
	}
	var before, after runtime.MemStats
	goroutines := runtime.NumGoroutine()
	done := func(Result) {}
	reqs := make([]*fakeRequest, flows)
	for i := range reqs {
		reqs[i] = &fakeRequest{s: keep[i].app}
	}
	runtime.GC()
	runtime.GC() // what finalizers held
	runtime.ReadMemStats(&before)
	for i, fd := range fds {
		keep[i].Relay = l.Start(reqs[i], loop.Unwatched(fd), done)
	}
	for _, f := range keep {
		f.up.Write([]byte("x"))
		f.app.take(t, 1)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / flows
	t.Logf("%d bytes of heap for an idle relay, %d of them its struct", each, unsafe.Sizeof(Relay{}))
	if each > 600 {
		t.Errorf("%d bytes of heap for an idle relay", each)
	}
	if !testkit.Until(testkit.Patience, func() bool { return runtime.NumGoroutine() <= goroutines }) {
		t.Fatalf("%d goroutines, were %d", runtime.NumGoroutine(), goroutines)
	}
	runtime.KeepAlive(keep)
	for _, f := range keep {
		f.Abort()
	}
	slots := make(chan int)
	testkit.Eventually(t, "no socket to be watched when all have gone", func() bool {
		l.do(func() { slots <- l.Watched() })
		return <-slots == 0
	})
	// And a new one is heard, with a slot that others had before.
	f := startFlow(t, l)
	f.up.Write([]byte("x"))
	f.app.take(t, 1)
}

// TestFairness: a small answer beside bulk flows waits for a round or two, not until they pause. Time would measure the
// machine, so what counts is how much the others moved between its being sent and its being handed over.
func TestFairness(t *testing.T) {
	const bulk, rounds = 4, 200
	l := newLoop(t)
	var wg sync.WaitGroup
	var others []*flowOf
	for range bulk {
		s := newStream()
		s.discard = true
		f := startWith(t, l, s, nil)
		others = append(others, f)
		wg.Go(func() {
			b := make([]byte, 1<<20)
			for {
				if _, err := f.up.Write(b); err != nil {
					return
				}
			}
		})
	}
	moved := func() (n uint64) {
		for _, f := range others {
			_, down := f.Bytes()
			n += down
		}
		return n
	}
	arrived := make(chan uint64, 1)
	s := newStream()
	s.onWrite = func() { arrived <- moved() }
	f := startWith(t, l, s, nil)
	var waits []int
	begin := time.Now()
	for range rounds {
		before := moved()
		if _, err := f.up.Write([]byte("pong")); err != nil {
			t.Fatal(err)
		}
		waits = append(waits, int(<-arrived-before))
	}
	took := time.Since(begin)
	slices.Sort(waits)
	t.Logf("the others moved %d bytes meanwhile (median; most %d); a round took %v; %d MB/s", waits[rounds/2], waits[rounds-1],
		took/rounds, moved()/1e6*1e9/uint64(took))
	if waits[rounds/2] > 3*bulk*turnBytes {
		t.Error("starved")
	}
	for _, o := range others {
		o.up.Close()
	}
	wg.Wait()
}

// echo sends back what comes, until EOF. (io.Copy between two sockets would splice, and the runtime keeps the pipes.)
func echo(c net.Conn) { io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) }
