package relay

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// fakeStream is the app's end with both of its buffers in sight. The app is the test.
type fakeStream struct {
	mu      sync.Mutex
	cond    *sync.Cond
	l       flow.Listener
	in      [][]byte // what the app sent and the relay has not read
	fin     bool     // the app's FIN, behind in
	rst     bool     // the app's RST, behind in
	early   bool     // report the RST before what is in in (another stack might)
	out     []byte   // what the relay wrote and the app has not read
	room    int      // capacity of out
	lie     int      // take that many bytes less than read
	outFIN  bool
	aborted bool
	closed  int
	held    int // unacknowledged bytes: what Queued adds
	full    bool
	discard bool
	eaten   int
	onWrite func()
}

func newStream() *fakeStream {
	s := &fakeStream{room: 1 << 20}
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *fakeStream) latched() bool { return s.rst || s.aborted }

func (s *fakeStream) ReadTo(w io.Writer) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aborted || s.rst && s.early {
		return 0, flow.ErrReset
	}
	for len(s.in) > 0 {
		k, err := w.Write(s.in[0])
		n += k
		if s.in[0] = s.in[0][k:]; len(s.in[0]) > 0 {
			if err == nil {
				panic("short write without an error")
			}
			return n, nil
		}
		s.in = s.in[1:]
		if err != nil {
			return n, nil
		}
	}
	switch {
	case n > 0:
		s.cond.Broadcast()
		return n, nil
	case s.rst:
		return 0, flow.ErrReset
	case s.fin:
		return 0, io.EOF
	}
	return 0, flow.ErrAgain
}

func (s *fakeStream) WriteFrom(p flow.Payload) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.latched() {
		return 0, flow.ErrReset
	}
	if s.outFIN {
		return 0, errors.New("closed for sending")
	}
	n := min(p.Len(), s.room-len(s.out))
	if n <= 0 {
		if p.Len() > 0 {
			s.full = true
		}
		return 0, flow.ErrAgain
	}
	var b []byte
	if s.discard {
		b = scratch[:n]
		s.eaten += n
	} else {
		at := len(s.out)
		s.out = append(s.out, make([]byte, n)...)
		b = s.out[at:]
	}
	if _, err := io.ReadFull(p, b); err != nil {
		panic(err)
	}
	if s.onWrite != nil {
		s.onWrite()
	}
	s.cond.Broadcast()
	return n - s.lie, nil
}

var scratch = make([]byte, 1<<16)

func (s *fakeStream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.latched() {
		return flow.ErrReset
	}
	s.outFIN = true
	s.cond.Broadcast()
	return nil
}

func (s *fakeStream) Abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aborted = true
	s.cond.Broadcast()
}

func (s *fakeStream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed++
	s.cond.Broadcast()
	return nil
}

// queuedStream also tells what the app's kernel has not acknowledged.
type queuedStream struct{ *fakeStream }

func (s queuedStream) Queued() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

// The app's side.

func (s *fakeStream) send(b ...[]byte) {
	s.mu.Lock()
	s.in = append(s.in, b...)
	l := s.l
	s.mu.Unlock()
	l.Ready(flow.Readable)
}

func (s *fakeStream) sendFIN() {
	s.mu.Lock()
	s.fin = true
	s.mu.Unlock()
	s.l.Ready(flow.Readable)
}

func (s *fakeStream) sendRST() {
	s.mu.Lock()
	s.rst = true
	s.mu.Unlock()
	s.l.Ready(flow.Hup)
}

// take reads n bytes, or what is there when n is 0, and tells that there is room.
func (s *fakeStream) take(t testing.TB, n int) []byte {
	t.Helper()
	s.wait(t, "data for the app", func() bool { return len(s.out) >= n })
	s.mu.Lock()
	if n == 0 {
		n = len(s.out)
	}
	b := s.out[:n:n]
	s.out = s.out[n:]
	told := s.full
	s.full = false
	s.mu.Unlock()
	if told {
		s.l.Ready(flow.Writable)
	}
	return b
}

// wait waits until ok, which is called with the lock held.
func (s *fakeStream) wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	stop := time.AfterFunc(testkit.Patience, func() { s.mu.Lock(); s.cond.Broadcast(); s.mu.Unlock() })
	defer stop.Stop()
	begin := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !ok() {
		if time.Since(begin) >= testkit.Patience {
			t.Fatalf("no %s after %v", what, testkit.Patience)
		}
		s.cond.Wait()
	}
}

func (s *fakeStream) state() (fin, aborted bool, closed int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.outFIN, s.aborted, s.closed
}

// fakeRequest is a held SYN. Opened comes from another goroutine at once, or when the test calls open.
type fakeRequest struct {
	s      *fakeStream
	give   flow.Stream // what Opened gets; nil: s
	err    error       // Opened's
	hold   bool        // the test calls open itself
	mu     sync.Mutex
	l      flow.Listener
	reject []flow.Refusal
}

func (q *fakeRequest) Flow() flow.Flow { return flow.Flow{Proto: flow.TCP} }
func (q *fakeRequest) OnCancel(func()) {}
func (q *fakeRequest) Accept(l flow.Listener) {
	q.mu.Lock()
	q.l = l
	if q.s != nil {
		q.s.l = l
	}
	q.mu.Unlock()
	if !q.hold {
		q.open()
	}
}

func (q *fakeRequest) Reject(r flow.Refusal) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.reject = append(q.reject, r)
}

func (q *fakeRequest) open() {
	switch {
	case q.err != nil:
		q.l.Opened(nil, q.err)
	case q.give != nil:
		q.l.Opened(q.give, nil)
	default:
		q.l.Opened(q.s, nil)
	}
}

// newLoop runs a loop, which is closed at the end of the test: then no goroutine and no fd may be left.
func newLoop(t testing.TB) *Loop {
	t.Helper()
	testkit.CheckLeaks(t)
	l, err := NewLoop(Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(testkit.Patience):
			t.Error("Run did not return")
		}
	})
	return l
}

func TestMain(m *testing.M) { testkit.Main(m) }

// tcpPair is a connected socket for a relay and its far end.
func tcpPair(t testing.TB) (fd int, peer *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return tcpPairOn(t, ln)
}

func tcpPairOn(t testing.TB, ln net.Listener) (fd int, peer *net.TCPConn) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	to := netip.MustParseAddrPort(ln.Addr().String())
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	return fd, c.(*net.TCPConn)
}

// flowOf is one relay with both its ends.
type flowOf struct {
	*Relay
	app  *fakeStream
	up   *net.TCPConn
	done chan Result
}

func startFlow(t testing.TB, l *Loop) *flowOf { return startWith(t, l, newStream(), nil) }

func startWith(t testing.TB, l *Loop, s *fakeStream, give flow.Stream) *flowOf {
	t.Helper()
	fd, peer := tcpPair(t)
	f := &flowOf{app: s, up: peer, done: make(chan Result, 2)}
	f.Relay = l.Start(&fakeRequest{s: s, give: give}, loop.Unwatched(fd), func(r Result) { f.done <- r })
	return f
}

func (f *flowOf) result(t testing.TB) Result {
	t.Helper()
	select {
	case r := <-f.done:
		select {
		case <-f.done:
			t.Error("done was called twice")
		case <-time.After(time.Millisecond):
		}
		if _, _, closed := f.app.state(); closed != 1 {
			t.Errorf("the stream was closed %d times", closed)
		}
		return r
	case <-time.After(testkit.Patience):
		t.Fatal("the relay did not end")
	}
	panic("unreachable")
}

// running fails the test if the relay has ended.
func (f *flowOf) running(t testing.TB) {
	t.Helper()
	select {
	case r := <-f.done:
		t.Fatalf("ended early: %+v", r)
	case <-time.After(30 * time.Millisecond):
	}
}

func (f *flowOf) read(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(f.up, b); err != nil {
		t.Fatalf("the upstream got no %d bytes: %v", n, err)
	}
	return b
}

// end is how reading from the relay's socket ends: nil for FIN, ECONNRESET for RST.
func (f *flowOf) end(t testing.TB) error {
	t.Helper()
	n, err := f.up.Read(make([]byte, 1))
	if n > 0 {
		t.Fatal("the upstream got data and not the end")
	}
	if err == io.EOF {
		return nil
	}
	return err
}

func (f *flowOf) wantEnd(t testing.TB, reset bool) {
	t.Helper()
	err := f.end(t)
	if reset && !errors.Is(err, unix.ECONNRESET) || !reset && err != nil {
		t.Errorf("the upstream saw %v, want reset=%v", err, reset)
	}
}

func sendReset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}
