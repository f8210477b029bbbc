package kernel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// A watch whose reads fail is said once and begun again; until then what others change is put back a little later, and
// afterwards at once.
func TestWatchFails(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		var log strings.Builder
		c := testConfig(t)
		c.Log = slog.New(slog.NewTextHandler(io.MultiWriter(&log, testWriter{t}), nil)) // read when Run has ended
		moved := make(chan struct{}, 1)
		c.OnDefaultRoute = func() {
			select {
			case moved <- struct{}{}:
			default:
			}
		}
		h, tun := upOwned(t, c, false)
		defer tun.Close()
		settled(t)
		during := state(t)
		watches := breakWatches(t, h)
		defer watches.restore()

		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() { h.Run(ctx); close(ended) }()
		testkit.Eventually(t, "a warning that one watch ended", func() bool { return len(h.Warnings()) == 1 })
		watches.writes.Close()
		testkit.Eventually(t, "a warning that both ended", func() bool { return len(h.Warnings()) == 2 })
		for _, f := range h.Warnings() {
			if !strings.Contains(f, "lost the netlink subscription for ") {
				t.Error(f)
			}
		}
		select {
		case <-moved:
		case <-time.After(testkit.Patience):
			t.Error("nobody said that the default route may have changed")
		}
		harm(t, w, "unwatched", during)
		n := watches.tries.Load()
		testkit.Eventually(t, "tries that go on", func() bool { return watches.tries.Load() > n+4 })
		watches.may.Store(true)
		testkit.Eventually(t, "a watch again", func() bool { return len(h.Warnings()) == 0 })
		n = watches.tries.Load()
		harm(t, w, "watched again", during)
		if watches.tries.Load() != n {
			t.Error("the new watch ended as well")
		}
		cancel()
		<-ended
		for what, want := range map[string]int{"lost the netlink subscription": 2, "subscription is back": 2} {
			if got := strings.Count(log.String(), what); got != want {
				t.Errorf("%q was logged %d times, want %d", what, got, want)
			}
		}
		down(t, h)
	})
}

// brokenWatches are the two watches of a Host, which fail, and cannot be begun again for a while.
type brokenWatches struct {
	writes  *os.File // one watch ends when this is closed
	tries   atomic.Int32
	may     atomic.Bool // they can be begun again
	restore func()
}

// breakWatches replaces the watches of a Host that does not run yet.
func breakWatches(t *testing.T, h *Host) *brokenWatches {
	t.Helper()
	// Run subscribes on whatever thread: the sockets of this namespace are there beforehand.
	again := map[int]*os.File{}
	var b brokenWatches
	reads, writes, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	b.writes = writes
	for _, s := range []*source{h.events, h.nfEvents} {
		if again[s.proto], err = subscribe(s.proto, s.groups...); err != nil {
			t.Fatal(err)
		}
	}
	h.events.f.Close()
	h.events.f = reads // it ends when writes is closed
	if err := h.nfEvents.f.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err) // this one has failed by the time that Run comes
	}
	wasAgain, wasMost, wasSubscribe := watchAgain, watchMost, subscribe
	b.restore = func() { watchAgain, watchMost, subscribe = wasAgain, wasMost, wasSubscribe }
	watchAgain, watchMost = time.Millisecond, 50*time.Millisecond
	subscribe = func(proto int, _ ...int) (*os.File, error) {
		b.tries.Add(1)
		if !b.may.Load() {
			return nil, unix.EMFILE
		}
		return again[proto], nil
	}
	return &b
}

// harm changes what Steer has made, wants it put back, and the host closed.
func harm(t *testing.T, w *world, when, during string) {
	t.Helper()
	for _, f := range []func(){
		func() { ip(t, "-4 rule flush protocol 118") },
		func() { ip(t, "-6 route flush table 30323") },
		func() { nft(t, "flush", "chain", "inet", "viasocks", "output") },
	} {
		f()
		testkit.Eventually(t, when+": put back", func() bool { return state(t) == during })
	}
	w.mustBeClosed(t, "steered")
}

// Close ends a Run's watch for good.
func TestSourceClosed(t *testing.T) {
	s := &source{proto: unix.NETLINK_ROUTE}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	s.close()
	if err := s.open(); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}
