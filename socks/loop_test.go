package socks

import (
	"context"
	"errors"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestGoroutines: two hundred dials and two hundred associations have no goroutine of ours.
func TestGoroutines(t *testing.T) {
	const n = 200
	_, c, srv := setup(t, Options{})
	srv.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Cmd == sockstest.CmdConnect {
			return sockstest.Silence()
		}
		return sockstest.Fault{}
	})
	before := ours()
	ctx, cancel := context.WithCancel(context.Background())
	results := make(chan error, n)
	for range n {
		c.Connect(ctx, on(c.d), testDst, func(_ loop.Socket, err error) { results <- err })
	}
	assocs := make(chan *Association, n)
	for range n {
		c.Associate(context.Background(), on(c.d), func(a *Association, err error) {
			if err != nil {
				t.Error(err)
			}
			assocs <- a
		})
	}
	testkit.Eventually(t, "all dials to be pending", func() bool {
		return c.d.Stats() == Stats{Pending: n, Associations: n} && srv.Stats().Requests == 2*n
	})
	// Goroutines of the test server that have not run yet can't be told from ours.
	if now := 0; !testkit.Until(testkit.Patience, func() bool { now = ours(); return now <= before }) {
		t.Errorf("%d goroutines before, %d with %d dials pending and %d associations", before, now, n, n)
	}
	cancel()
	for range n {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		(<-assocs).Close()
	}
	testkit.Eventually(t, "all to be given back", func() bool { return c.d.Stats() == Stats{} && srv.Stats().Open == 0 })
}

// ours counts the goroutines that are not the test server's.
func ours() (n int) {
	b := make([]byte, 4<<20)
	for s := range strings.SplitSeq(string(b[:runtime.Stack(b, true)]), "\n\n") {
		if !strings.Contains(s, "sockstest") {
			n++
		}
	}
	return n
}

func TestCancel(t *testing.T) {
	d, c, srv := setup(t, Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := connect(t, c, ctx, testDst); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	if _, err := connect(t, c, ctx, testDst); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ended before: %v", err)
	}
	if _, err := associate(t, c, ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("association: %v", err)
	}
	testkit.Eventually(t, "all to be given back", func() bool { return srv.Stats().Open == 0 && d.Stats() == Stats{} })
}

// TestOnce: whatever ends a dial, done is called once. Grants, cancels and Close race.
func TestOnce(t *testing.T) {
	const n = 300
	d, c, srv := setup(t, Options{})
	dst := AddrFrom(echo(t))
	_ = srv
	var calls [n]atomic.Int32
	var wg sync.WaitGroup
	wg.Add(n)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var kinds [4]atomic.Int32
	for i := range n {
		c.Connect(ctx, on(d), dst, func(s loop.Socket, err error) {
			if calls[i].Add(1) == 1 {
				wg.Done()
			}
			switch {
			case err == nil:
				kinds[0].Add(1)
				s.Close()
			case errors.Is(err, context.Canceled):
				kinds[1].Add(1)
			case errors.Is(err, ErrClosed):
				kinds[2].Add(1)
			default:
				kinds[3].Add(1)
				t.Error(err)
			}
		})
		switch i {
		case n / 2:
			testkit.Pace(3 * time.Millisecond)
			cancel()
			ctx = context.Background()
		case n - n/8:
			go end(d)
		}
	}
	wg.Wait()
	end(d)
	for i := range calls {
		if c := calls[i].Load(); c != 1 {
			t.Errorf("dial %d: done was called %d times", i, c)
		}
	}
	t.Logf("granted %d, cancelled %d, closed %d", kinds[0].Load(), kinds[1].Load(), kinds[2].Load())
}

// TestFinishedOnce: a cancel that was already on its way when the dial was granted, or refused, does nothing.
func TestFinishedOnce(t *testing.T) {
	d, c, srv := setup(t, Options{})
	srv.Redirect(testDst.AddrPort(), echo(t))
	for _, refused := range []bool{false, true} {
		if refused {
			srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(5) })
		}
		results := make(chan dialed, 2)
		done := func(s loop.Socket, err error) { results <- dialed{s.Release(), err} }
		p := &dial{d: d, l: on(d), c: c, ctx: context.Background(), cmd: CmdConnect, dst: testDst, done: done}
		d.start(p)
		r := <-results
		if r.err == nil {
			unix.Close(r.fd)
		}
		on(d).Note(&p.Node, canceled|lookedUp|started|loop.Tick)
		ran := make(chan struct{})
		on(d).Post(func() { close(ran) })
		<-ran
		if len(results) > 0 || d.Stats() != (Stats{}) {
			t.Errorf("refused %v: done was called again, or the books are wrong: %+v", refused, d.Stats())
		}
	}
}

// TestCall: a dial with a loop.Call ends when that is canceled, before, during and after it.
func TestCall(t *testing.T) {
	d, c, srv := setup(t, Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	call := new(loop.Call)
	ch := make(chan error, 1)
	done := func(s loop.Socket, err error) { s.Close(); ch <- err }
	c.Connect(call, on(d), testDst, done)
	testkit.Eventually(t, "the requests", func() bool { return srv.Stats().Requests == 1 })
	if len(ch) > 0 {
		t.Fatal("it ended by itself")
	}
	call.Cancel()
	if err := <-ch; err != context.Canceled {
		t.Error(err)
	}
	c.Connect(call, on(d), testDst, done)
	if err := <-ch; err != context.Canceled {
		t.Errorf("ended before: %v", err)
	}
	srv.SetFault(nil)
	srv.Redirect(testDst.AddrPort(), echo(t))
	call = new(loop.Call)
	c.Connect(call, on(d), testDst, done)
	if err := <-ch; err != nil {
		t.Error(err)
	}
	call.Cancel()
	ran := make(chan struct{})
	on(d).Post(func() { close(ran) })
	<-ran
	if len(ch) > 0 || d.Stats() != (Stats{}) {
		t.Errorf("done was called again, or the books are wrong: %+v", d.Stats())
	}
}

func TestCloseFailsAll(t *testing.T) {
	d, c, srv := setup(t, Options{})
	a, err := associate(t, c, context.Background())
	if err != nil {
		t.Fatal(err)
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	errs := make(chan error, 10)
	a.OnClose(func(err error) { errs <- err })
	c.Connect(context.Background(), on(c.d), testDst, func(_ loop.Socket, err error) {
		errs <- err
		// A callback that starts anew must not hang, nor start anything.
		c.Connect(context.Background(), on(c.d), testDst, func(_ loop.Socket, err error) { errs <- err })
	})
	c.Associate(context.Background(), on(c.d), func(_ *Association, err error) { errs <- err })
	testkit.Eventually(t, "the requests", func() bool { return srv.Stats().Requests == 3 })
	end(d)
	for range 4 {
		if err := <-errs; err != ErrClosed {
			t.Error(err)
		}
	}
	end(d)
	a.Close()
	if _, err := connect(t, c, context.Background(), testDst); err != ErrClosed {
		t.Error(err)
	}
}

// TestDescriptorsRunOut: it is this host's fault and not the server's, and it passes.
func TestDescriptorsRunOut(t *testing.T) {
	_, c, srv := setup(t, Options{})
	srv.Redirect(testDst.AddrPort(), echo(t))
	mustConnect(t, c)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	_, err := connect(t, c, context.Background(), testDst)
	_, aerr := associate(t, c, context.Background())
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{err, aerr} {
		var se *ServerError
		if !errors.Is(err, unix.EMFILE) || errors.As(err, &se) {
			t.Errorf("%v", err)
		}
	}
	mustConnect(t, c)
}

// BenchmarkConnect is a dial by the loop, one after the other, with the test server and its target on the same cores.
func BenchmarkConnect(b *testing.B) {
	_, c, srv := setup(b, Options{})
	srv.Redirect(testDst.AddrPort(), echo(b))
	b.ReportAllocs()
	for b.Loop() {
		ch := make(chan error, 1)
		c.Connect(context.Background(), on(c.d), testDst, func(s loop.Socket, err error) {
			s.Close()
			ch <- err
		})
		if err := <-ch; err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkConnect64 has 64 dials under way at any time.
func BenchmarkConnect64(b *testing.B) {
	_, c, srv := setup(b, Options{})
	srv.Redirect(testDst.AddrPort(), echo(b))
	slots := make(chan struct{}, 64)
	b.ReportAllocs()
	for b.Loop() {
		slots <- struct{}{}
		c.Connect(context.Background(), on(c.d), testDst, func(s loop.Socket, err error) {
			if err != nil {
				b.Error(err)
			}
			s.CloseReset()
			<-slots
		})
	}
	for range 64 {
		slots <- struct{}{}
	}
}

// BenchmarkConnectBlocking is the yardstick for BenchmarkConnect: the same by net.Dial and a goroutine that waits.
func BenchmarkConnectBlocking(b *testing.B) {
	_, c, srv := setup(b, Options{})
	srv.Redirect(testDst.AddrPort(), echo(b))
	b.ReportAllocs()
	for b.Loop() {
		nc, err := net.Dial("tcp", srv.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		h, _ := NewHandshake(c.server, CmdConnect, testDst)
		for !h.Done() {
			if out := h.Output(); len(out) > 0 {
				n, err := nc.Write(out)
				if err != nil {
					b.Fatal(err)
				}
				h.Sent(n)
				continue
			}
			n, err := nc.Read(h.Input())
			if err != nil {
				b.Fatal(err)
			}
			if err := h.Received(n); err != nil {
				b.Fatal(err)
			}
		}
		nc.Close()
	}
}

// A zero means the same to SetTimeouts as to NewDialer: the default. With no timeout at all every dial would fail at once.
func TestSetTimeoutsDefaults(t *testing.T) {
	d, err := NewDialer(Options{ConnectTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	d.SetTimeouts(0, 0)
	if d.connectTimeout.Load() != int64(DefaultConnectTimeout) || d.handshakeTimeout.Load() != int64(DefaultHandshakeTimeout) {
		t.Errorf("%v and %v", time.Duration(d.connectTimeout.Load()), time.Duration(d.handshakeTimeout.Load()))
	}
}
