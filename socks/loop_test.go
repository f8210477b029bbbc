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
		c.Connect(ctx, testDst, func(fd int, err error) { results <- err })
	}
	assocs := make(chan *Association, n)
	for range n {
		c.Associate(context.Background(), func(a *Association, err error) {
			if err != nil {
				t.Error(err)
			}
			assocs <- a
		})
	}
	waitFor(t, func() bool { return c.d.Stats() == Stats{n, n} && srv.Stats().Requests == 2*n })
	// Goroutines of the test server that have not run yet can't be told from ours.
	for end := time.Now().Add(patience); ours() > before && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if now := ours(); now > before {
		t.Errorf("%d goroutines before, %d with %d dials pending and %d associations", before, now, n, n)
	}
	cancel()
	for range n {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		(<-assocs).Close()
	}
	waitFor(t, func() bool { return c.d.Stats() == Stats{} && srv.Stats().Open == 0 })
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

func waitFor(t testing.TB, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come true")
		}
	}
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
	waitFor(t, func() bool { return srv.Stats().Open == 0 && d.Stats() == Stats{} })
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
		c.Connect(ctx, dst, func(fd int, err error) {
			if calls[i].Add(1) == 1 {
				wg.Done()
			}
			switch {
			case err == nil:
				kinds[0].Add(1)
				unix.Close(fd)
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
			time.Sleep(3 * time.Millisecond)
			cancel()
			ctx = context.Background()
		case n - n/8:
			go d.Close()
		}
	}
	wg.Wait()
	d.Close()
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
		p := &dial{d: d, c: c, ctx: context.Background(), cmd: CmdConnect, dst: testDst, done: func(fd int, err error) { results <- dialed{fd, err} }}
		d.start(p)
		r := <-results
		if r.err == nil {
			unix.Close(r.fd)
		}
		ran := make(chan struct{})
		d.post(func() { p.finish(context.Canceled); close(ran) })
		<-ran
		if len(results) > 0 || d.Stats() != (Stats{}) {
			t.Errorf("refused %v: done was called again, or the books are wrong: %+v", refused, d.Stats())
		}
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
	c.Connect(context.Background(), testDst, func(_ int, err error) {
		errs <- err
		// A callback that starts anew must not hang, nor start anything.
		c.Connect(context.Background(), testDst, func(_ int, err error) { errs <- err })
	})
	c.Associate(context.Background(), func(_ *Association, err error) { errs <- err })
	waitFor(t, func() bool { return srv.Stats().Requests == 3 })
	d.Close()
	for range 4 {
		if err := <-errs; err != ErrClosed {
			t.Error(err)
		}
	}
	d.Close()
	a.Close()
	if _, err := connect(t, c, context.Background(), testDst); err != ErrClosed {
		t.Error(err)
	}
}

func TestTimers(t *testing.T) {
	var h timers
	var all []*dial
	for i := range 500 {
		p := &dial{heapAt: -1}
		all = append(all, p)
		h.set(p, time.Duration((i*7919)%1009))
	}
	for i, p := range all {
		switch i % 3 {
		case 0:
			h.set(p, time.Duration((i*104729)%997))
		case 1:
			h.remove(p)
			h.remove(p)
		}
	}
	last := time.Duration(-1)
	n := 0
	for ; len(h) > 0; n++ {
		if h[0].when < last || h[0].heapAt != 0 {
			t.Fatalf("%v after %v", h[0].when, last)
		}
		last = h[0].when
		h.remove(h[0])
	}
	if n != 333 {
		t.Errorf("%d were left", n)
	}
}

// TestTablesShrink: what a burst of dials made is given back when little is left of it, and what is left stays.
func TestTablesShrink(t *testing.T) {
	d := &Dialer{fds: map[int32]registered{}}
	var err error
	if d.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(d.epoll)
	const n = 2 * remake
	for i := range n {
		d.fds[int32(i)] = registered{gen: int32(i)}
	}
	d.peak = n
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if i != fd {
			d.forget(i)
		}
	}
	if len(d.fds) != 1 || d.fds[int32(fd)].gen != int32(fd) || d.peak > remake {
		t.Errorf("%d descriptors, peak %d", len(d.fds), d.peak)
	}
	if err := d.register(fd, nil, unix.EPOLLIN); err != nil || d.peak > remake {
		t.Error(err, d.peak)
	}
	d.shut(fd)

	var h timers
	var all []*dial
	for i := range n {
		p := &dial{heapAt: -1}
		all = append(all, p)
		h.set(p, time.Duration(n-i))
	}
	for _, p := range all[:n-1] {
		h.remove(p)
	}
	if len(h) != 1 || cap(h) > remake || h[0] != all[n-1] {
		t.Errorf("%d timers, room for %d", len(h), cap(h))
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
		c.Connect(context.Background(), testDst, func(fd int, err error) {
			if err == nil {
				unix.Close(fd)
			}
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
		c.Connect(context.Background(), testDst, func(fd int, err error) {
			if err != nil {
				b.Error(err)
			} else {
				unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
				unix.Close(fd)
			}
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
