package route

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// logQueue is the number of log lines that may wait. A reader of the log that is slower loses lines, not flows.
const logQueue = 4096

// flowLog writes log lines from a goroutine of its own: the frame reader and the loops must not wait for a terminal or
// a journal.
type flowLog struct {
	h       slog.Handler
	queue   chan slog.Record
	dropped atomic.Uint64
	over    chan struct{}
	once    sync.Once
	wg      sync.WaitGroup
}

func newFlowLog(log *slog.Logger) *flowLog {
	l := &flowLog{queue: make(chan slog.Record, logQueue), over: make(chan struct{})}
	if log != nil {
		l.h = log.Handler()
	} else {
		l.h = slog.DiscardHandler
	}
	return l
}

func (l *flowLog) enabled(level slog.Level) bool { return l.h.Enabled(context.Background(), level) }

// post queues a line. It does not block; from any goroutine.
func (l *flowLog) post(level slog.Level, msg string, attrs ...slog.Attr) {
	if !l.enabled(level) {
		return
	}
	rec := slog.NewRecord(time.Now(), level, msg, 0)
	rec.AddAttrs(attrs...)
	select {
	case l.queue <- rec:
	default:
		l.dropped.Add(1)
	}
}

func (l *flowLog) start() {
	l.wg.Go(func() {
		for {
			select {
			case rec := <-l.queue:
				l.write(rec)
			case <-l.over:
				for { // what was queued before the end
					select {
					case rec := <-l.queue:
						l.write(rec)
					default:
						return
					}
				}
			}
		}
	})
}

func (l *flowLog) write(rec slog.Record) {
	_ = l.h.Handle(context.Background(), rec)
	if n := l.dropped.Swap(0); n > 0 {
		lost := slog.NewRecord(time.Now(), slog.LevelWarn, "log lines were lost: the log is read too slowly", 0)
		lost.AddAttrs(slog.Uint64("lines", n))
		_ = l.h.Handle(context.Background(), lost)
	}
}

// close writes what is queued and ends the goroutine.
func (l *flowLog) close() {
	l.once.Do(func() { close(l.over) })
	l.wg.Wait()
}

// end is the one line that a flow gets.
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
	Host     string // the name that the app asked for, if it is known
	Rule     string // as Rule.String, or "default", "none", "dns"
	Upstream string
	State    string // dialing, open; UDP also retrying; in the log how it ended
	Up, Down uint64
}

func info(id uint64, proto flow.Proto, src, dst netip.AddrPort, start time.Time) FlowInfo {
	return FlowInfo{Flow: flow.Flow{ID: id, Proto: proto, Src: src, Dst: dst, Start: start}}
}

// logTo is a Logger whose lines go through the queue.
func logTo(l *flowLog) *slog.Logger { return slog.New(&queueHandler{l, l.h}) }

// queueHandler queues the lines of those who log by slog. WithAttrs and WithGroup are not used by them: what they are
// given would be lost on the way, so they write past the queue.
type queueHandler struct {
	l *flowLog
	slog.Handler
}

func (q *queueHandler) Handle(_ context.Context, rec slog.Record) error {
	select {
	case q.l.queue <- rec.Clone():
	default:
		q.l.dropped.Add(1)
	}
	return nil
}
