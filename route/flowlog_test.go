package route

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// slowHandler counts lines, and blocks until it is let go.
type slowHandler struct {
	slog.Handler
	mu    sync.Mutex
	lines []string
	held  chan struct{}
	begun chan struct{}
	once  sync.Once
}

func (h *slowHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h *slowHandler) Handle(_ context.Context, r slog.Record) error {
	h.once.Do(func() { close(h.begun) })
	<-h.held
	h.mu.Lock()
	h.lines = append(h.lines, r.Message)
	h.mu.Unlock()
	return nil
}

// A log that nobody reads costs lines and a bounded queue, and is told when it is read again; what was queued is written
// before the end, and the queue of a burst is given back.
func TestFlowLogSlow(t *testing.T) {
	testkit.CheckLeaks(t)
	h := &slowHandler{held: make(chan struct{}), begun: make(chan struct{})}
	l := newFlowLog(slog.New(h))
	l.start()
	l.post(slog.LevelInfo, "first")
	<-h.begun // the first is being written: all else waits
	const lost = 100
	for range logQueue + lost {
		l.post(slog.LevelInfo, "line")
	}
	close(h.held)
	testkit.Eventually(t, "the queue to be empty", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.queue) == 0
	})
	l.post(slog.LevelInfo, "last")
	l.close()
	l.close()
	count := make(map[string]int)
	for _, m := range h.lines {
		count[m]++
	}
	if count["first"] != 1 || count["line"] != logQueue || count["last"] != 1 {
		t.Errorf("written: %v", count)
	}
	if len(h.lines) != logQueue+3 { // and the one that tells of the loss
		t.Errorf("%d lines", len(h.lines))
	}
	if l.dropped != 0 || cap(l.queue) > logKeep {
		t.Errorf("%d dropped and not told, queue of %d kept", l.dropped, cap(l.queue))
	}
}

// Tables of a burst are made anew when little is left in them: a map never shrinks. What is left stays.
func TestTablesShrink(t *testing.T) {
	var ts streams
	var flows atomic.Int64
	var all []*stream
	for range remake + 1 {
		s := &stream{}
		if err := ts.add(s, &flows, 2*remake); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	for _, s := range all[1:] {
		ts.remove(s)
	}
	if len(ts.all) != 1 || ts.all[0] != all[0] || cap(ts.all) > remake/4 {
		t.Errorf("the table still has %d entries, room for %d", len(ts.all), cap(ts.all))
	}
	var ms mappings
	ms.init(1)
	var maps []*mapping
	for i := range remake + 1 {
		m := &mapping{src: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), uint16(i+1))}
		ms.add(m)
		maps = append(maps, m)
	}
	for _, m := range maps[1:] {
		ms.remove(m)
	}
	if ms.bySrc[maps[0].src] != maps[0] || len(ms.bySrc) != 1 || cap(ms.all) > remake/4 || ms.oldest != maps[0] ||
		ms.newest != maps[0] {
		t.Errorf("the table of mappings still has %d entries, room for %d", len(ms.bySrc), cap(ms.all))
	}
}
