package relay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
)

// TestRandomLives gives flows random lives: both sides send, stall, close and reset at random. Whatever happens: what
// arrives is a prefix of what was sent, all of it if that side's FIN arrived; a RST is never a FIN; and the flow ends.
func TestRandomLives(t *testing.T) {
	defer func(d time.Duration) { lingerLimit = d }(lingerLimit)
	lingerLimit = patience // a side that stalls must not lose what a RST left it
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
	wr := rand.New(rand.NewPCG(seed, 2))
	go func() {
		for i := 0; i < cut; {
			k := min(1+wr.IntN(100000), cut-i)
			if _, err := f.up.Write(down[i : i+k]); err != nil {
				wrote <- err
				return
			}
			i += k
		}
		if upReset { // when everything has arrived: SO_LINGER 0 would drop the rest
			raw, _ := f.up.SyscallConn()
			for left := 1; left > 0 && !gone.Load(); time.Sleep(100 * time.Microsecond) {
				raw.Control(func(fd uintptr) { left = unacked(int(fd)) })
			}
			sendReset(f.up)
			wrote <- nil
			return
		}
		wrote <- f.up.CloseWrite()
	}()
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
	go func() {
		for i := 0; i < acut; {
			k := min(1+r.IntN(1<<r.IntN(17)), acut-i)
			s.send(up[i : i+k])
			i += k
			if r.IntN(50) == 0 {
				time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
			}
		}
		if appReset {
			s.sendRST()
		} else {
			s.sendFIN()
		}
	}()
	var gotDown []byte
	deadline := time.Now().Add(2 * patience)
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
	werr, rerr := <-wrote, <-read
	fin, aborted, closed := s.state()
	if closed != 1 {
		t.Errorf("closed %d times", closed)
	}
	if !bytes.HasPrefix(down, gotDown) || !bytes.HasPrefix(up, gotUp) {
		t.Error("data differs")
	}
	if int(res.Down) != len(gotDown) {
		t.Errorf("counted %d down, %d came", res.Down, len(gotDown))
	}
	switch {
	case !upReset && !appReset:
		if res.Err != nil || werr != nil || rerr != nil || len(gotUp) != len(up) || len(gotDown) != len(down) || aborted || !fin {
			t.Errorf(
				"%+v, write %v, read %v, up %d/%d, down %d/%d",
				res,
				werr,
				rerr,
				len(gotUp),
				len(up),
				len(gotDown),
				len(down),
			)
		}
	case upReset && !appReset:
		// Our own FIN may have gone up before, but the app's end is a RST, with all that came before it.
		if !errors.Is(res.Err, ErrUpstreamReset) || !aborted || fin || len(gotDown) != cut {
			t.Errorf("%+v, aborted %v, fin %v, down %d/%d", res, aborted, fin, len(gotDown), cut)
		}
	case appReset && !upReset:
		// The kernel tells of a RST once: whoever asks first, the writer or the reader.
		told := errors.Is(rerr, unix.ECONNRESET) || errors.Is(werr, unix.ECONNRESET)
		if !errors.Is(res.Err, ErrAppReset) || !told || len(gotUp) != acut {
			t.Errorf("%+v, read %v, write %v, up %d/%d", res, rerr, werr, len(gotUp), acut)
		}
	default:
		if res.Err == nil || !aborted {
			t.Errorf("%+v, aborted %v", res, aborted)
		}
	}
}
