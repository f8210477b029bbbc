package route

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

const (
	// logQueue is the number of log lines that may wait, in addition to at most as many that are being written. If
	// the log is read too slowly, lines are lost, but no flow waits.
	logQueue = 4096
	// logKeep is the longest queue whose memory is kept when it is empty: a line has 300 bytes, so a burst of them is
	// a megabyte.
	logKeep = 64
)

// flowLog writes log lines from its own goroutine, because the frame reader and the loops must not wait for a
// terminal or a journal.
type flowLog struct {
	h  slog.Handler
	wg sync.WaitGroup

	mu      sync.Mutex
	more    sync.Cond
	queue   []slog.Record
	dropped uint64
	over    bool
}

func newFlowLog(log *slog.Logger) *flowLog {
	l := &flowLog{}
	l.more.L = &l.mu
	if log != nil {
		l.h = log.Handler()
	} else {
		l.h = slog.DiscardHandler
	}
	return l
}

func (l *flowLog) enabled(level slog.Level) bool { return l.h.Enabled(context.Background(), level) }

// post queues a line. It does not block and may be called from any goroutine.
func (l *flowLog) post(level slog.Level, msg string, attrs ...slog.Attr) {
	if !l.enabled(level) {
		return
	}
	rec := slog.NewRecord(time.Now(), level, msg, 0)
	rec.AddAttrs(attrs...)
	l.put(rec)
}

func (l *flowLog) put(rec slog.Record) {
	l.mu.Lock()
	switch {
	case len(l.queue) >= logQueue:
		l.dropped++
	default:
		l.queue = append(l.queue, rec)
	}
	l.mu.Unlock()
	l.more.Signal()
}

func (l *flowLog) start() {
	l.wg.Go(func() {
		var recs []slog.Record
		for {
			clear(recs)
			if cap(recs) > logKeep {
				recs = nil
			}
			l.mu.Lock()
			for len(l.queue) == 0 && !l.over {
				l.more.Wait()
			}
			recs, l.queue = l.queue, recs[:0]
			dropped := l.dropped
			l.dropped = 0
			l.mu.Unlock()
			if len(recs) == 0 { // closed, and everything queued before is written
				return
			}
			l.write(recs, dropped)
		}
	})
}

func (l *flowLog) write(recs []slog.Record, dropped uint64) {
	for _, rec := range recs {
		_ = l.h.Handle(context.Background(), rec)
	}
	if dropped > 0 {
		lost := slog.NewRecord(time.Now(), slog.LevelWarn, "log lines were lost: the log is read too slowly", 0)
		lost.AddAttrs(slog.Uint64("lines", dropped))
		_ = l.h.Handle(context.Background(), lost)
	}
}

// close writes what is queued and ends the goroutine.
func (l *flowLog) close() {
	l.mu.Lock()
	l.over = true
	l.mu.Unlock()
	l.more.Signal()
	l.wg.Wait()
}

// end logs the single line of a flow.
func (l *flowLog) end(f FlowInfo, took time.Duration, err error) {
	if !l.enabled(slog.LevelInfo) {
		return
	}
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	l.post(slog.LevelInfo, "flow",
		slog.Uint64("flow", f.ID), slog.String("proto", f.Proto.String()), slog.String("src", f.Src.String()),
		slog.String("dst", f.Dst.String()), slog.String("host", f.Host), slog.String("rule", f.Rule),
		slog.String("upstream", f.Upstream), slog.String("state", f.State), slog.Uint64("up", f.Up),
		slog.Uint64("down", f.Down), slog.Duration("dur", took.Round(time.Millisecond)), slog.String("err", reason))
}

// FlowInfo is a flow as status shows it. Up and Down are payload bytes.
type FlowInfo struct {
	flow.Flow
	Host     string // the name that the app asked for, if known
	Rule     string // as Rule.String, or "default", "none", "dns"
	Upstream string
	PID      int // of the program, and Exe its executable, if a rule has asked for it
	Exe      string
	State    string // dialing, open; for UDP also retrying; in the log how it ended
	Up, Down uint64
}

func info(id uint64, proto flow.Proto, src, dst netip.AddrPort, start time.Time) FlowInfo {
	return FlowInfo{Flow: flow.Flow{ID: id, Proto: proto, Src: src, Dst: dst, Start: start}}
}

// logTo returns a Logger whose lines go through the queue.
func logTo(l *flowLog) *slog.Logger { return slog.New(&queueHandler{l, l.h}) }

// queueHandler queues the lines of code that logs with slog. This code does not use WithAttrs and WithGroup; the
// handlers that these return write without the queue, because it could not carry their attributes.
type queueHandler struct {
	l *flowLog
	slog.Handler
}

func (q *queueHandler) Handle(_ context.Context, rec slog.Record) error {
	q.l.put(rec.Clone())
	return nil
}
