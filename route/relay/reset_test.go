package relay

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestReset: RST stays RST, whatever went before. Names: who resets, what was before.
func TestReset(t *testing.T) {
	up := func(f *flowOf) { sendReset(f.up) }
	app := func(f *flowOf) { f.app.sendRST() }
	upFIN := func(t *testing.T, f *flowOf) {
		f.up.CloseWrite()
		f.app.wait(t, "FIN", func() bool { return f.app.outFIN })
	}
	appFIN := func(t *testing.T, f *flowOf) { f.app.sendFIN(); f.wantEnd(t, false) }
	for _, c := range []struct {
		name   string
		before func(*testing.T, *flowOf)
		reset  func(*flowOf)
		want   error
	}{
		{"upstream, established", nil, up, ErrUpstreamReset},
		{"upstream, after its FIN", upFIN, up, ErrUpstreamReset},
		{"upstream, after the app's FIN", appFIN, up, ErrUpstreamReset},
		{"app, established", nil, app, ErrAppReset},
		{"app, after its FIN", appFIN, app, ErrAppReset},
		{"app, after the upstream's FIN", upFIN, app, ErrAppReset},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := startFlow(t, newLoop(t))
			f.app.send([]byte("x"))
			f.read(t, 1)
			if c.before != nil {
				c.before(t, f)
			}
			c.reset(f)
			r := f.result(t)
			if !errors.Is(r.Err, c.want) {
				t.Errorf("err %v, want %v", r.Err, c.want)
			}
			if _, aborted, _ := f.app.state(); !aborted {
				t.Error("the app's end was not aborted")
			}
			if c.want == ErrAppReset && c.name != "app, after its FIN" {
				f.wantEnd(t, true)
			}
			if c.name == "app, after its FIN" { // read said EOF before; writing tells
				testkit.Eventually(t, "the upstream's write to fail", func() bool {
					_, err := f.up.Write([]byte("x"))
					return err != nil
				})
			}
		})
	}
}

// TestKernelDataBeforeRST holds what the package relies on: a RST leaves the receive queue alone.
func TestKernelDataBeforeRST(t *testing.T) {
	fd, peer := tcpPair(t)
	defer unix.Close(fd)
	peer.Write(pattern(10000))
	sendReset(peer)
	var pfd = []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for end := time.Now().Add(testkit.Patience); time.Now().Before(end); { // a signal of the runtime's ends it early
		if n, _ := unix.Poll(pfd, 5000); n > 0 {
			break
		}
	}
	if pfd[0].Revents&(unix.POLLERR|unix.POLLHUP) != unix.POLLERR|unix.POLLHUP {
		t.Fatalf("revents %#x", pfd[0].Revents)
	}
	if n := unread(fd); n != 10000 {
		t.Errorf("FIONREAD %d", n)
	}
	b := make([]byte, 20000)
	if n, e := recv(fd, b, 0); n != 10000 || e != 0 {
		t.Errorf("recv: %d, %v", n, e)
	}
	if n, e := recv(fd, b, 0); e != unix.ECONNRESET {
		t.Errorf("then recv: %d, %v", n, e)
	}
}

// TestDataBeforeUpstreamReset: the app reads nothing when the RST comes; it gets all before, then the RST.
func TestDataBeforeUpstreamReset(t *testing.T) {
	s := newStream()
	s.room = 1000
	f := startWith(t, newLoop(t), s, queuedStream{s})
	data := pattern(100000)
	f.up.Write(data)
	s.wait(t, "full stream", func() bool { return s.full })
	sendReset(f.up)
	f.running(t)
	s.mu.Lock()
	s.held = 7
	s.mu.Unlock()
	var got []byte
	for len(got) < len(data) {
		got = append(got, s.take(t, min(1000, len(data)-len(got)))...)
	}
	if !bytes.Equal(got, data) {
		t.Error("data differs")
	}
	f.running(t) // the app's kernel has not acknowledged the last bytes
	s.mu.Lock()
	s.held = 0
	s.mu.Unlock()
	if r := f.result(t); !errors.Is(r.Err, ErrUpstreamReset) || r.Down != uint64(len(data)) {
		t.Errorf("%+v", r)
	}
	if fin, aborted, _ := s.state(); fin || !aborted {
		t.Errorf("FIN %v, RST %v", fin, aborted)
	}
}

// TestDataBeforeAppReset: the same the other way, with an upstream that reads late.
func TestDataBeforeAppReset(t *testing.T) {
	for _, early := range []bool{false, true} {
		f := startFlow(t, newLoop(t))
		data := pattern(8 << 20)
		for i := 0; i < len(data); i += 1000 {
			f.app.mu.Lock()
			f.app.in = append(f.app.in, data[i:min(i+1000, len(data))])
			f.app.mu.Unlock()
		}
		f.Ready(flow.Readable)
		f.running(t)
		f.app.mu.Lock()
		f.app.early = early
		f.app.mu.Unlock()
		f.app.sendRST()
		f.running(t)
		got, err := io.ReadAll(f.up)
		if !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("ended with %v", err)
		}
		if !bytes.HasPrefix(data, got) || !early && len(got) != len(data) {
			t.Errorf("got %d of %d bytes", len(got), len(data))
		}
		if r := f.result(t); !errors.Is(r.Err, ErrAppReset) || r.Up != uint64(len(got)) {
			t.Errorf("%+v, got %d", r, len(got))
		}
	}
}

// TestResetDoesNotWaitForEver: the living side takes nothing.
func TestResetDoesNotWaitForEver(t *testing.T) {
	defer func(d time.Duration) { lingerLimit = d }(lingerLimit)
	lingerLimit = 100 * time.Millisecond
	t.Run("app does not read", func(t *testing.T) {
		s := newStream()
		s.room = 10
		f := startWith(t, newLoop(t), s, nil)
		f.up.Write(pattern(1000))
		s.wait(t, "full stream", func() bool { return s.full })
		sendReset(f.up)
		if r := f.result(t); !errors.Is(r.Err, ErrUpstreamReset) {
			t.Errorf("%+v", r)
		}
	})
	t.Run("upstream does not read", func(t *testing.T) {
		f := startFlow(t, newLoop(t))
		f.app.send(pattern(64 << 20))
		f.running(t)
		f.app.sendRST()
		if r := f.result(t); !errors.Is(r.Err, ErrAppReset) {
			t.Errorf("%+v", r)
		}
	})
}
