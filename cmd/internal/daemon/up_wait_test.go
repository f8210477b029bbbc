package daemon

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestMayCome(t *testing.T) {
	s := parse(t, "--proxy", "socks5://192.0.2.1").Upstreams[0].Server
	for _, tt := range []struct {
		op  string
		err error
		may bool
	}{
		{socks.OpConnect, syscall.ECONNREFUSED, true},
		{socks.OpConnect, syscall.ENETUNREACH, true},
		{socks.OpConnect, os.ErrDeadlineExceeded, true},
		{socks.OpResolve, errors.New("no such host"), true},
		{socks.OpHandshake, io.EOF, true},
		{socks.OpAuthenticate, socks.ErrCredentials, false},
		{socks.OpAuthenticate, socks.ErrMethod, false},
		{socks.OpHandshake, socks.ErrMalformed, false},
		{socks.OpResolve, &ourAddress{}, false},
	} {
		err := explain(s, &socks.ServerError{Server: s.String(), Op: tt.op, Err: tt.err})
		if got := mayCome(fmt.Errorf("and so: %w", err)); got != tt.may {
			t.Errorf("%v: may come: %v", err, got)
		}
	}
	if mayCome(errors.New("something else")) {
		t.Error("anything else is waited for")
	}
}

// A proxy that is not there is looked for after 1, 2, 4 s and so on, at once when something changed, and by one probe at a time.
func TestWaiter(t *testing.T) {
	testkit.CheckLeaks(t)
	s, err := sockstest.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	u, write, log := newUp(t, "proxy socks5://127.0.0.1:1\n")
	var ran sync.WaitGroup
	defer ran.Wait()
	none := u.newWaiter(t.Context(), &ran)
	if none.changed(); none.busy {
		t.Error("it looks, and does not wait")
	}
	none.close()

	refused := errors.New("refused")
	u.waitFor(refused)
	u.waitFor(refused)
	if n := strings.Count(log.String(), "waiting for the proxy"); n != 1 {
		t.Errorf("it is said %d times", n)
	}
	if s := u.status(); s.Waiting != "refused" {
		t.Errorf("%+v", s)
	}
	w := u.newWaiter(t.Context(), &ran)
	defer w.close()
	for _, want := range []time.Duration{2, 4, 8, 16, 30, 30} {
		if w.found(refused); w.pause != want*time.Second {
			t.Errorf("the pause after the next is %v, want %vs", w.pause, int(want))
		}
	}
	w.changed()
	w.changed()
	if !w.busy || w.pause != waitFirst {
		t.Errorf("it does not look at once: %+v", w)
	}
	if w.found(<-w.tried) {
		t.Error("the proxy is there")
	}
	if u.stateNow() != control.Waiting {
		t.Error(u.stateNow())
	}
	write("proxy " + s.URL() + "\n")
	u.reload()
	if w.changed(); !w.found(<-w.tried) || u.waitsFor() != nil || u.stateNow() != control.Ready {
		t.Errorf("not found: %v", u.waitsFor())
	}
}
