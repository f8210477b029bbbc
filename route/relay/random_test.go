package relay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestRandomLives gives flows random lives: both sides send, stall, close and reset at random. Whatever happens: what
// arrives is a prefix of what was sent, all of it if that side's FIN arrived; a RST is never a FIN; and the flow ends.
func TestRandomLives(t *testing.T) {
	defer func(d time.Duration) { lingerLimit = d }(lingerLimit)
	lingerLimit = testkit.Patience // a side that stalls must not lose what a RST left it
	l := newLoop(t)
	n := 100
	if testing.Short() {
		n = 20
	}
	for seed := range n {
		begin := time.Now()
		randomLife(t, l, uint64(seed))
		if d := time.Since(begin); d > time.Second {
			t.Logf("seed %d took %v", seed, d)
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func randomLife(t *testing.T, l *Loop, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	s := newStream()
	s.room = 1 << (8 + r.IntN(14))
	f := startWith(t, l, s, nil)
	up, down := pattern(r.IntN(1<<(r.IntN(9)+14))), pattern(r.IntN(min(1<<(r.IntN(9)+14), s.room*400)))
	upReset, appReset := r.IntN(5) == 0, r.IntN(5) == 0

	// The upstream writes down, and reads what came up.
	wrote := make(chan error, 1)
	var gone atomic.Bool
	cut := len(down)
	if upReset && cut > 0 {
		cut = r.IntN(cut)
	}
	go func() { wrote <- writeDown(f, rand.New(rand.NewPCG(seed, 2)), down[:cut], upReset, &gone) }()
	var gotUp []byte
	read := make(chan error, 1)
	go func() {
		var err error
		gotUp, err = io.ReadAll(f.up)
		read <- err
	}()

	// The app writes up and reads what came down.
	acut := len(up)
	if appReset && acut > 0 {
		acut = r.IntN(acut)
	}
	go appLife(s, r, up[:acut], appReset)
	var gotDown []byte
	deadline := time.Now().Add(2 * testkit.Patience)
	var res Result
	for over := false; !over; {
		select {
		case res = <-f.done:
			over = true
			gone.Store(true)
		case <-time.After(time.Duration(seed%3) * 20 * time.Microsecond):
		}
		s.mu.Lock()
		gotDown = append(gotDown, s.out...)
		s.out = nil
		told := s.full
		s.full = false
		s.mu.Unlock()
		if told {
			f.Ready(flow.Writable)
		}
		if time.Now().After(deadline) {
			t.Fatalf("did not end: %d up, %d down", len(gotUp), len(gotDown))
		}
	}
	x := life{up: up[:acut], down: down[:cut], gotDown: gotDown, upReset: upReset, appReset: appReset}
	x.werr, x.rerr = <-wrote, <-read
	x.gotUp = gotUp
	x.check(t, s, res)
}

// life is what was sent and what came, and how it ended.
type life struct {
	up, down, gotUp, gotDown []byte
	upReset, appReset        bool
	werr, rerr               error // of the upstream
}

func (x *life) check(t *testing.T, s *fakeStream, res Result) {
	t.Helper()
	fin, aborted, closed := s.state()
	if closed != 1 {
		t.Errorf("closed %d times", closed)
	}
	if !bytes.HasPrefix(x.down, x.gotDown) || !bytes.HasPrefix(x.up, x.gotUp) {
		t.Error("data differs")
	}
	if int(res.Down) != len(x.gotDown) {
		t.Errorf("counted %d down, %d came", res.Down, len(x.gotDown))
	}
	figures := fmt.Sprintf("%+v, aborted %v, fin %v, write %v, read %v, up %d/%d, down %d/%d", res, aborted, fin,
		x.werr, x.rerr, len(x.gotUp), len(x.up), len(x.gotDown), len(x.down))
	switch {
	case !x.upReset && !x.appReset:
		if res.Err != nil || x.werr != nil || x.rerr != nil || len(x.gotUp) != len(x.up) || len(x.gotDown) != len(x.down) ||
			aborted || !fin {
			t.Error(figures)
		}
	case x.upReset && !x.appReset:
		// Our own FIN may have gone up before, but the app's end is a RST, with all that came before it.
		if !errors.Is(res.Err, ErrUpstreamReset) || !aborted || fin || len(x.gotDown) != len(x.down) {
			t.Error(figures)
		}
	case x.appReset && !x.upReset:
		// The kernel tells of a RST once: whoever asks first, the writer or the reader.
		told := errors.Is(x.rerr, unix.ECONNRESET) || errors.Is(x.werr, unix.ECONNRESET)
		if !errors.Is(res.Err, ErrAppReset) || !told || len(x.gotUp) != len(x.up) {
			t.Error(figures)
		}
	default:
		if res.Err == nil || !aborted {
			t.Error(figures)
		}
	}
}

// appLife is the app, which writes and then ends its stream.
func appLife(s *fakeStream, r *rand.Rand, up []byte, reset bool) {
	for i := 0; i < len(up); {
		k := min(1+r.IntN(1<<r.IntN(17)), len(up)-i)
		s.send(up[i : i+k])
		i += k
		if r.IntN(50) == 0 {
			testkit.Pace(time.Duration(r.IntN(300)) * time.Microsecond)
		}
	}
	if reset {
		s.sendRST()
	} else {
		s.sendFIN()
	}
}

// writeDown is the upstream, which writes and then ends its stream.
func writeDown(f *flowOf, r *rand.Rand, down []byte, reset bool, gone *atomic.Bool) error {
	for i := 0; i < len(down); {
		k := min(1+r.IntN(100000), len(down)-i)
		if _, err := f.up.Write(down[i : i+k]); err != nil {
			return err
		}
		i += k
	}
	if reset { // when everything has arrived: SO_LINGER 0 would drop the rest
		raw, _ := f.up.SyscallConn()
		testkit.Until(testkit.Patience, func() bool {
			left := 0
			raw.Control(func(fd uintptr) { left = unacked(int(fd)) })
			return left == 0 || gone.Load()
		})
		sendReset(f.up)
		return nil
	}
	return f.up.CloseWrite()
}
