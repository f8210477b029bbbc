package stack

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// echo accepts every request and writes back what it reads, without a goroutine of its own for each: all work is done
// on one loop, as a relay does.
type echo struct {
	mu   sync.Mutex
	cond sync.Cond
	todo []*echoConn
	end  bool
	done chan struct{}
}

type echoConn struct {
	e    *echo
	st   flow.Stream
	on   bool
	buf  []byte
	fin  bool
	over bool
}

func newEcho() *echo {
	e := &echo{done: make(chan struct{})}
	e.cond.L = &e.mu
	go e.run()
	return e
}

func (e *echo) HandleStream(_ int, r flow.StreamRequest) { r.Accept(&echoConn{e: e}) }
func (e *echo) HandlePackets(int, []flow.Packet)         {}
func (c *echoConn) Opened(st flow.Stream, _ error)       { c.wake(st) }
func (c *echoConn) Ready(flow.Events)                    { c.wake(nil) }

func (c *echoConn) wake(st flow.Stream) {
	c.e.mu.Lock()
	if st != nil {
		c.st = st
	}
	if !c.on && c.st != nil {
		c.on = true
		c.e.todo = append(c.e.todo, c)
	}
	c.e.mu.Unlock()
	c.e.cond.Signal()
}

func (e *echo) run() {
	defer close(e.done)
	for {
		e.mu.Lock()
		for len(e.todo) == 0 && !e.end {
			e.cond.Wait()
		}
		if e.end {
			e.mu.Unlock()
			return
		}
		c := e.todo[0]
		e.todo = e.todo[1:]
		c.on = false
		e.mu.Unlock()
		c.step()
	}
}

func (c *echoConn) Write(b []byte) (int, error) { c.buf = append(c.buf, b...); return len(b), nil }

func (c *echoConn) step() {
	for !c.over {
		for len(c.buf) > 0 {
			n, err := c.st.WriteFrom(bytes.NewReader(c.buf))
			c.buf = c.buf[n:]
			if err != nil {
				if !errors.Is(err, flow.ErrAgain) {
					c.over = true
					c.st.Close()
				}
				return
			}
		}
		c.buf = nil
		if c.fin {
			c.over = true
			c.st.CloseWrite()
			c.st.Close()
			return
		}
		_, err := c.st.ReadTo(c)
		switch {
		case err == io.EOF:
			c.fin = true
		case errors.Is(err, flow.ErrAgain):
			return
		case err != nil:
			c.over = true
			c.st.Close()
			return
		}
	}
}

func (e *echo) stop() {
	e.mu.Lock()
	e.end = true
	e.mu.Unlock()
	e.cond.Signal()
	<-e.done
}

func TestThousand(t *testing.T) {
	for name, off := range offloads {
		t.Run(name, func(t *testing.T) {
			n := 1000
			if off&tun.TSO == 0 {
				n = 100 // short frames overflow the pipe's queue, and the test becomes one of timeouts
			}
			e := newEcho()
			defer e.stop()
			p := newPair(t, off, Config{Handler: e, Limits: Limits{PendingPerDest: n}})
			want := make([]byte, 20<<10)
			rand.Read(want)
			errs := make(chan error, n)
			ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
			defer cancel()
			for i := range n {
				go func() {
					dst := netip.AddrPortFrom(srv4.Addr(), uint16(i+1))
					c, err := p.dial(ctx, dst)
					if err != nil {
						errs <- fmt.Errorf("dial %v: %w", dst, err)
						return
					}
					defer c.Close()
					go func() {
						c.Write(want)
						c.CloseWrite()
					}()
					c.SetReadDeadline(time.Now().Add(4 * time.Minute))
					got, err := io.ReadAll(c)
					if err == nil && !bytes.Equal(got, want) {
						err = fmt.Errorf("%d bytes of %d", len(got), len(want))
					}
					errs <- err
				}()
			}
			for range n {
				if err := <-errs; err != nil {
					t.Fatal(err)
				}
			}
			testkit.Eventually(t, "the streams to end", func() bool {
				return p.st.Stats().Streams == 0 && registered(p.st) == 0
			})
			if s := p.st.Stats(); s.Accepted != uint64(n) || s.AppResets != 0 || s.Aborted != 0 {
				t.Fatalf("%d accepted, %d reset, %d aborted", s.Accepted, s.AppResets, s.Aborted)
			}
		})
	}
}

// TestIdle: an open, idle stream has no goroutine, and what it costs is measured.
func TestIdle(t *testing.T) {
	const n = 500
	e := newEcho()
	defer e.stop()
	p := newPair(t, offAll, Config{Handler: e, Limits: Limits{PendingPerDest: n}})
	p.mustDial(srv6) // so that all that the stack has runs
	before := runtime.NumGoroutine()
	m := heapBytes()
	for i := range n {
		p.mustDial(netip.AddrPortFrom(srv4.Addr(), uint16(i+1)))
	}
	testkit.Eventually(
		t,
		"the handshakes to end",
		func() bool { return p.st.Stats().Streams == n+1 && runtime.NumGoroutine() <= before },
	)
	t.Logf("%d streams: %d bytes of heap each, app's side and test included", n, (heapBytes()-m)/n)
}

func heapBytes() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// TestStuckApp: an app that never reads costs a bounded buffer, which is given back.
func TestStuckApp(t *testing.T) {
	const n = 20
	p := newPair(t, offAll, Config{})
	before := heapBytes()
	var ups []*testConn
	var apps []io.Closer
	for range n {
		app, up := p.connect(srv4)
		ups, apps = append(ups, up), append(apps, app)
	}
	total := 0
	for _, up := range ups {
		total += fillUp(t, up)
	}
	got := heapBytes() - before
	t.Logf("%d KiB written, %d KiB of heap for each stream whose app does not read (both stacks)", total/n>>10, got/n>>10)
	if total/n > 1<<20+maxSendBuffer/4 || got/n > 3<<20 {
		t.Errorf("too much")
	}
	// Still open: a zero window is no error.
	testkit.Never(t, 300*time.Millisecond, "a stream ended", func() bool {
		return slices.ContainsFunc(ups, func(up *testConn) bool {
			_, err := up.st.ReadTo(io.Discard)
			return !errors.Is(err, flow.ErrAgain)
		})
	})
	for _, up := range ups {
		up.st.Close()
	}
	for _, app := range apps {
		app.Close()
	}
	after := 0
	if !testkit.Until(testkit.Patience, func() bool {
		after = heapBytes() - before
		return after < max(got/2, n*64<<10) // the pipe keeps its buffers
	}) {
		t.Errorf("%d KiB of heap for each stream remain", after/n>>10)
	}
}

// TestStuckUpstream: an app that writes and is not read from is held back, and goes on when it is.
func TestStuckUpstream(t *testing.T) {
	p := newPair(t, offAll, Config{})
	app, up := p.connect(srv4)
	const n = 20 << 20
	wrote := make(chan error, 1)
	go func() {
		b := make([]byte, 64<<10)
		for range n / len(b) {
			if _, err := app.Write(b); err != nil {
				wrote <- err
				return
			}
		}
		wrote <- app.CloseWrite()
	}()
	testkit.Never(t, 300*time.Millisecond, "20 MiB went nowhere", func() bool { return len(wrote) > 0 })
	// A writer that takes nothing, or a little: the turn ends, nothing is lost.
	must(t, up.await(flow.Readable))
	if n, err := up.st.ReadTo(&sliceWriter{}); n != 0 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	rest := 0
	for {
		m, err := up.Read(make([]byte, 100_001))
		rest += m
		if err == io.EOF {
			break
		}
		must(t, err)
	}
	must(t, <-wrote)
	if rest != n {
		t.Fatalf("%d bytes of %d", rest, n)
	}
}

// TestServerFirst: the far end speaks first, together with the handshake.
func TestServerFirst(t *testing.T) {
	p := newPair(t, offAll, Config{})
	app, up := p.connect(srv4)
	up.Write([]byte("220 hello"))
	b := make([]byte, 20)
	n, err := app.Read(b)
	if err != nil || string(b[:n]) != "220 hello" {
		t.Fatalf("%q, %v", b[:n], err)
	}
}

// badPayload promises more than it has.
type badPayload struct{ err error }

func (badPayload) Len() int                     { return 100 }
func (p badPayload) Read(b []byte) (int, error) { return 0, p.err }

func TestBadPayload(t *testing.T) {
	p := newPair(t, offAll, Config{})
	_, up := p.connect(srv4)
	for _, e := range []error{nil, io.EOF, io.ErrUnexpectedEOF} {
		if n, err := up.st.WriteFrom(badPayload{e}); n != 0 || err == nil || errors.Is(err, flow.ErrAgain) {
			t.Fatalf("%v: %d, %v", e, n, err)
		}
	}
	if n, err := up.st.WriteFrom(strings.NewReader("")); n != 0 || err != nil {
		t.Fatalf("nothing: %d, %v", n, err)
	}
}

func TestResetAllRefuses(t *testing.T) {
	p := newPair(t, offAll, Config{})
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	errs := make(chan error, 1)
	go func() {
		_, err := p.dial(ctx, srv4)
		errs <- err
	}()
	r := p.request()
	gone := make(chan struct{})
	r.OnCancel(func() { close(gone) })
	p.st.ResetAll()
	<-gone
	if err := <-errs; err == nil || ctx.Err() != nil {
		t.Fatalf("pending: %v", err)
	}
	if _, err := p.dial(ctx, srv4); err == nil || ctx.Err() != nil {
		t.Fatalf("new: %v", err)
	}
}

func TestLifecycle(t *testing.T) {
	t.Run("never run", func(t *testing.T) {
		testkit.CheckLeaks(t)
		a, _ := tuntest.Pipe(1500, offAll)
		s, err := New(Config{Device: a, Handler: new(testHandler)})
		must(t, err)
		must(t, s.Close())
		must(t, s.Close())
		if err := s.Run(context.Background()); err == nil {
			t.Fatal("ran after Close")
		}
	})
	t.Run("bad config", func(t *testing.T) {
		testkit.CheckLeaks(t)
		for _, c := range []Config{{}, {Handler: new(testHandler), KeepaliveIdle: -1},
			{Handler: new(testHandler), Limits: Limits{Pending: -1}}} {
			a, _ := tuntest.Pipe(1500, offAll)
			c.Device = a
			if _, err := New(c); err == nil {
				t.Fatal("no error")
			}
			if err := a.Write(&tun.Header{}, [][]byte{{0x45}}); err == nil {
				t.Fatal("the device is still open")
			}
		}
	})
	t.Run("the device goes", func(t *testing.T) {
		testkit.CheckLeaks(t)
		a, b := tuntest.Pipe(1500, offAll)
		s, err := New(Config{Device: a, Handler: new(testHandler)})
		must(t, err)
		ran := make(chan error)
		go func() { ran <- s.Run(context.Background()) }()
		b.Close()
		if err := <-ran; err == nil {
			t.Fatal("no error")
		}
	})
	t.Run("handshakes and requests under way", func(t *testing.T) {
		r := newRaw(t, Config{})
		for i := range 50 {
			r.send(tun.Header{}, segment(netip.AddrPortFrom(appIP4, uint16(i+1)), srv4, 1, 0, 2, nil, nil))
			q := r.request()
			if i%2 == 0 {
				q.Accept(newTestConn()) // nobody answers the SYN-ACK
			}
		}
	})
}

// TestSuperFrames: 64 KiB cross in one frame, both ways.
func TestSuperFrames(t *testing.T) {
	p := newPair(t, offAll, Config{})
	app, up := p.connect(srv4)
	for _, tt := range []struct {
		name string
		w    io.Writer
		r    io.Reader
		in   func() (frames, bytes uint64)
	}{
		{"down", up, app, func() (uint64, uint64) { s := p.st.Stats(); return s.FramesOut, s.BytesOut }},
		{"up", app, up, func() (uint64, uint64) { s := p.st.Stats(); return s.FramesIn, s.BytesIn }},
	} {
		const n = 30 << 20
		// A machine that stalls costs retransmissions, and short frames after them: not each time.
		for try := 1; ; try++ {
			f0, b0 := tt.in()
			go func() {
				b := make([]byte, 65160)
				for m := 0; m < n; m += len(b) {
					tt.w.Write(b[:min(len(b), n-m)])
				}
			}()
			if _, err := io.CopyN(io.Discard, tt.r, n); err != nil {
				t.Fatal(err)
			}
			f1, b1 := tt.in()
			t.Logf(
				"%s: %d frames of %d bytes on average for %d MiB, acknowledgements included",
				tt.name,
				f1-f0,
				(b1-b0)/(f1-f0),
				n>>20,
			)
			if f1-f0 <= n/20_000 {
				break
			}
			if try == 5 {
				t.Fatalf("%s: the frames are short", tt.name)
			}
		}
	}
}

// TestTinyWrites: packets of more slices than writev takes are joined.
func TestTinyWrites(t *testing.T) {
	p := newPair(t, offAll, Config{})
	app, up := p.connect(srv4)
	filled := fillUp(t, up) // so that what follows is queued, and sent in large packets
	var want bytes.Buffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		io.CopyN(io.Discard, app, int64(filled)-50_000)
	}()
	for i := range 20_000 {
		s := fmt.Sprintf("%05d", i)
		want.WriteString(s)
		if _, err := up.Write([]byte(s)); err != nil {
			t.Error(err)
		}
	}
	must(t, up.st.CloseWrite())
	<-read
	app.SetReadDeadline(time.Now().Add(testkit.Patience))
	got, err := io.ReadAll(app)
	must(t, err)
	if len(got) < want.Len() || !bytes.Equal(got[len(got)-want.Len():], want.Bytes()) {
		t.Fatalf("%d bytes differ", len(got))
	}
}

// TestOutFrame: the slices of a packet stay in order, and no more than writev takes.
func TestOutFrame(t *testing.T) {
	for _, n := range []int{1, 2, maxParts - 1, maxParts, maxParts + 1, maxParts + 2, 3 * maxParts} {
		f := &outFrame{skip: 3}
		want := []byte{}
		for i := range n {
			b := []byte{byte(i), byte(i >> 8), 7, 8}
			want = append(want, b...)
			v := buffer.NewViewWithData(b)
			f.add(v)
		}
		got := bytes.Join(f.parts, nil)
		if !bytes.Equal(got, want[3:]) || len(f.parts) > maxParts {
			t.Fatalf("%d slices: %d parts, %d bytes of %d", n, len(f.parts), len(got), len(want)-3)
		}
	}
}
