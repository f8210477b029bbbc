package control

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
	"github.com/viasocks/viasocks/stack/testkit"
)

// source is a Backend of events: each of those who watch gets what is put into feed.
type source struct {
	feed     chan []Event
	watching atomic.Int32
	failed   atomic.Int32 // sends that failed
}

func (s *source) watch(ctx context.Context, send func([]Event) error) {
	s.watching.Add(1)
	defer s.watching.Add(-1)
	for {
		select {
		case <-ctx.Done():
			return
		case events, ok := <-s.feed:
			if !ok {
				return
			}
			if err := send(events); err != nil {
				s.failed.Add(1)
				return
			}
		}
	}
}

func watchServer(t *testing.T) (*source, *Server, string) {
	t.Helper()
	src := &source{feed: make(chan []Event)}
	path := filepath.Join(t.TempDir(), "control-1.sock")
	s, err := Listen(
		Options{Path: path, Group: -1, Backend: Backend{Status: sample, Flows: func() []Flow { return nil }, Watch: src.watch}},
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return src, s, path
}

func opened(id uint64) Event {
	return Event{
		Event: EventOpened,
		Time:  now,
		Flow:  &Flow{ID: id, Proto: "tcp", Src: "192.0.2.7:41022", Dst: "203.0.113.9:443", Start: now},
	}
}

func TestWatch(t *testing.T) {
	testkit.CheckLeaks(t)
	src, s, path := watchServer(t)
	c := NewClient(path)
	defer c.Close()
	got := make(chan Event)
	ended := make(chan error, 1)
	go func() {
		ended <- c.Watch(context.Background(), func(e Event) error { got <- e; return nil })
	}()
	src.feed <- []Event{opened(7), {Event: EventLost, Time: now, Lost: 3}}
	if e := <-got; e.Event != EventOpened || e.Flow == nil || e.ID != 7 || !e.Time.Equal(now) {
		t.Errorf("%+v", e)
	}
	if e := <-got; e.Event != EventLost || e.Lost != 3 || e.Flow != nil {
		t.Errorf("%+v", e)
	}
	// It goes on for longer than a request may take.
	for end := time.Now().Add(readTimeout + time.Second); time.Now().Before(end); testkit.Pace(100 * time.Millisecond) {
		select {
		case src.feed <- []Event{opened(8)}:
			<-got
		case err := <-ended:
			t.Fatalf("it ended: %v", err)
		}
	}
	s.Close() // with a watcher
	if err := <-ended; !errors.Is(err, ErrEnded) {
		t.Error(err)
	}
	if err := c.Watch(context.Background(), nil); !errors.Is(err, ErrNoDaemon) {
		t.Error(err)
	}
}

// The one who watches ends it: by its context, by an error of its own, or by its death.
func TestWatchEnds(t *testing.T) {
	testkit.CheckLeaks(t)
	src, _, path := watchServer(t)
	c := NewClient(path)
	defer c.Close()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Watch(ctx, func(Event) error { return nil }) }()
	testkit.Eventually(t, "a watcher", func() bool { return src.watching.Load() == 1 })
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	testkit.Eventually(t, "no watcher", func() bool { return src.watching.Load() == 0 })

	enough := errors.New("enough")
	go func() { ended <- c.Watch(context.Background(), func(Event) error { return enough }) }()
	src.feed <- []Event{opened(1)}
	if err := <-ended; err != enough {
		t.Error(err)
	}
	testkit.Eventually(t, "no watcher", func() bool { return src.watching.Load() == 0 })

	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "GET /v1/watch HTTP/1.1\r\nHost: x\r\n\r\n")
	testkit.Eventually(t, "a watcher", func() bool { return src.watching.Load() == 1 })
	conn.Close()
	testkit.Eventually(t, "no watcher", func() bool { return src.watching.Load() == 0 })
}

// TestWatchEndsEarly: a watcher that ends before it has an answer is told of that, and not that viasocks closed the connection.
func TestWatchEndsEarly(t *testing.T) {
	testkit.CheckLeaks(t)
	ctx, cancel := context.WithCancel(context.Background())
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Read(make([]byte, 1000))
		cancel()
		_ = conn.Close()
	}()
	c := NewClient(path)
	defer c.Close()
	if err := c.Watch(ctx, func(Event) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A watcher that does not read is disconnected, and told so when it reads again.
func TestWatchSlow(t *testing.T) {
	testkit.CheckLeaks(t)
	old := watchPatience
	watchPatience = 50 * time.Millisecond
	defer func() { watchPatience = old }()
	src, s, path := watchServer(t)
	defer s.Close() // before the time is set back
	c := NewClient(path)
	defer c.Close()
	read := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- c.Watch(context.Background(), func(Event) error { <-read; return nil })
	}()
	release := sync.OnceFunc(func() { close(read) })
	defer release()
	events := make([]Event, 256)
	for i := range events {
		events[i] = opened(uint64(i))
	}
	testkit.Eventually(t, "the watcher to be disconnected", func() bool {
		select {
		case src.feed <- events:
		default: // it waits for the watcher, or is gone
		}
		return src.failed.Load() == 1 && src.watching.Load() == 0
	})
	release()
	if err := <-ended; !errors.Is(err, ErrSlow) || !strings.Contains(err.Error(), "was not read for") {
		t.Error(err)
	}
}

// There is a limit of watchers, and with all of them there the status is answered.
func TestManyWatchers(t *testing.T) {
	testkit.CheckLeaks(t)
	src, s, path := watchServer(t)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for range maxWatchers {
		c := NewClient(path)
		defer c.Close()
		wg.Go(func() { _ = c.Watch(ctx, func(Event) error { return nil }) })
	}
	testkit.Eventually(t, "all watchers", func() bool { return src.watching.Load() == maxWatchers })
	c := NewClient(path)
	defer c.Close()
	if err := c.Watch(ctx, nil); err == nil || err.Error() != "cannot watch: "+errManyWatchers.Error() {
		t.Error(err)
	}
	if _, err := c.Status(); err != nil {
		t.Error(err)
	}
	cancel()
	testkit.Eventually(t, "room", func() bool { return s.ownersWatch.Load() == 0 })
}

// Other users may not watch.
func TestWatchPeers(t *testing.T) {
	_, s, _ := watchServer(t)
	for _, p := range []privsock.Peer{{UID: 65000, GID: 65000}, {Err: errors.New("unknown")}} {
		req, err := http.NewRequestWithContext(context.WithValue(context.Background(), peerKey{}, p), "GET", "/v1/watch", nil)
		if err != nil {
			t.Fatal(err)
		}
		w := &refusedWriter{}
		s.watch(w, req)
		if w.status != http.StatusForbidden {
			t.Errorf("%+v: %d", p, w.status)
		}
	}
}

type refusedWriter struct{ status int }

func (w *refusedWriter) Header() http.Header         { return http.Header{} }
func (w *refusedWriter) Write(b []byte) (int, error) { return len(b), nil }
func (w *refusedWriter) WriteHeader(status int)      { w.status = status }

func TestWriteEvent(t *testing.T) {
	f := Flow{
		ID: 7, Proto: "tcp", PID: 4711, Exe: "/usr/bin/aria2c", Src: "192.0.2.7:41022", Dst: "203.0.113.9:443",
		Host: "exa\x1b[31mmple.org",
		Rule: "default", Upstream: "proxy", State: "open", Start: *at(2 * time.Hour), Up: 4711, Down: 123456789,
	}
	over := f
	over.State = "reset"
	var b strings.Builder
	for _, e := range []Event{
		{Event: EventOpened, Time: now, Flow: &f},
		{Event: EventDialled, Time: now, Flow: &f},
		{Event: EventEstablished, Time: now, Flow: &f},
		{Event: EventClosed, Time: now, Flow: &over, Error: "reset by the \x1b]0;app"},
		{Event: EventClosed, Time: now, Flow: &Flow{ID: 8, Proto: "udp", Src: "192.0.2.7:5", Dst: "203.0.113.9:25",
			State: "rejected", Start: now}},
		{Event: EventLost, Time: now, Lost: 1203},
		{Event: "some\x1bthing", Time: now},
	} {
		if err := WriteEvent(&b, e); err != nil {
			t.Fatal(err)
		}
		var line strings.Builder
		if err := WriteJSONLine(&line, e); err != nil {
			t.Fatal(err)
		}
		var back Event
		if err := json.Unmarshal([]byte(line.String()), &back); err != nil || strings.Count(line.String(), "\n") != 1 ||
			strings.ContainsRune(line.String(), '\x1b') || back.Event != e.Event {
			t.Errorf("%v: %q", err, line.String())
		}
		b.WriteString("  " + line.String())
	}
	golden(t, "events.txt", b.String())
}
