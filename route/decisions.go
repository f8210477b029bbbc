package route

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

const (
	// decisionQueue is how many decisions may wait to be written. Further ones are dropped and counted.
	decisionQueue = 4096
	// decisionBuffer is how much is written at a time.
	decisionBuffer = 64 << 10
	// decisionEnd limits the wait, at the end, for a reader that does not read.
	decisionEnd = time.Second
	// decisionFault is the minimum time between two warnings about a file that cannot be written.
	decisionFault = time.Minute
)

// decision is a verdict on a flow.
type decision struct {
	at    time.Time
	flow  flow.Flow
	names []string
	v     *verdict
	owner *flow.Owner
}

// decisionLine is a decision in the form in which it is written: one JSON object on a line.
type decisionLine struct {
	Time    string   `json:"time"`
	Proto   string   `json:"proto,omitempty"`
	Src     string   `json:"src,omitempty"`
	Dst     string   `json:"dst,omitempty"`
	Names   []string `json:"names,omitempty"` // that the program asked for and whose answer contained dst
	Verdict string   `json:"verdict,omitempty"`
	Rule    string   `json:"rule,omitempty"`
	UID     *uint32  `json:"uid,omitempty"`
	PID     int      `json:"pid,omitempty"`
	Exe     string   `json:"exe,omitempty"`
	Cgroup  string   `json:"cgroup,omitempty"`
	Lost    uint64   `json:"lost,omitempty"` // number of missing lines before this one
}

// decisions writes decisions from its own goroutine. Posting never blocks.
type decisions struct {
	w    io.Writer
	log  *flowLog
	in   chan decision
	lost atomic.Uint64
	wg   sync.WaitGroup
	stop context.CancelFunc

	// The fields below belong to the goroutine.
	buf    []byte
	told   uint64 // part of lost that was reported
	faulty time.Time
}

func newDecisions(w io.Writer, log *flowLog) *decisions {
	if w == nil {
		return nil
	}
	return &decisions{w: w, log: log, in: make(chan decision, decisionQueue)}
}

// post queues a decision. It does not block and may be called from any goroutine. d may be nil.
func (d *decisions) post(x decision) {
	if d == nil {
		return
	}
	select {
	case d.in <- x:
	default:
		d.lost.Add(1)
	}
}

// start runs the goroutine until end. d may be nil.
func (d *decisions) start() {
	if d == nil {
		return
	}
	var ctx context.Context
	ctx, d.stop = context.WithCancel(context.Background())
	d.wg.Go(func() {
		for {
			select {
			case x := <-d.in:
				d.add(x)
			case <-ctx.Done():
				d.drain()
				return
			}
			d.drain()
		}
	})
}

// end writes what is queued and waits for that, but not for a reader that does not read.
func (d *decisions) end() {
	if d == nil {
		return
	}
	d.stop()
	over := make(chan struct{})
	go func() { d.wg.Wait(); close(over) }()
	late := time.NewTimer(decisionEnd)
	defer late.Stop()
	select {
	case <-over:
	case <-late.C:
	}
}

// drain writes everything that is queued.
func (d *decisions) drain() {
	for {
		select {
		case x := <-d.in:
			d.add(x)
			continue
		default:
		}
		d.flush()
		return
	}
}

func (d *decisions) add(x decision) {
	if lost := d.lost.Load(); lost != d.told {
		d.line(decisionLine{Time: stamp(time.Now()), Lost: lost - d.told})
		d.told = lost
	}
	l := decisionLine{
		Time: stamp(x.at), Proto: x.flow.Proto.String(), Src: x.flow.Src.String(), Dst: x.flow.Dst.String(),
		Names: x.names, Verdict: x.v.word(), Rule: x.v.rule,
	}
	if o := x.owner; o != nil && o.Known {
		l.UID, l.PID, l.Exe, l.Cgroup = &o.UID, o.PID, o.Exe, o.Cgroup
	}
	d.line(l)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func (d *decisions) line(l decisionLine) {
	b, err := json.Marshal(l)
	if err != nil { // it contains nothing that cannot be marshalled
		return
	}
	d.buf = append(append(d.buf, b...), '\n')
	if len(d.buf) >= decisionBuffer {
		d.flush()
	}
}

func (d *decisions) flush() {
	if len(d.buf) == 0 {
		return
	}
	n := uint64(0)
	for _, c := range d.buf {
		if c == '\n' {
			n++
		}
	}
	_, err := d.w.Write(d.buf)
	d.buf = d.buf[:0]
	if err == nil {
		return
	}
	d.lost.Add(n)
	if now := time.Now(); d.faulty.IsZero() || now.Sub(d.faulty) >= decisionFault {
		d.faulty = now
		d.log.post(slog.LevelWarn, "decisions cannot be written: lines are lost", slog.Any("err", err))
	}
}

// word returns the verdict in the words of a rule.
func (v *verdict) word() string {
	switch v.kind {
	case carry:
		if v.up.name == DirectName {
			return DirectName
		}
		return "via " + v.up.name
	case drop:
		return "drop"
	case resolve:
		return "resolve"
	}
	return "reject"
}
