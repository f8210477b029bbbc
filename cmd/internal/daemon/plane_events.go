package daemon

import (
	"context"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route"
)

const (
	// watchQueue limits the events that wait for a watcher.
	watchQueue = 1024
	// watchBatch limits the events that are passed on together. Their programs are looked up in one pass.
	watchBatch = 256
)

// watch passes the events of the flows to send until ctx ends, send fails, or the data plane is over.
func (p *plane) watch(ctx context.Context, send func([]control.Event) error) error {
	w := p.router.Watch(watchQueue)
	defer w.Close()
	names := eventNames{p.programs, map[uint64]program{}}
	batch := make([]control.Event, 0, watchBatch+1)
	for {
		over := false
		batch = batch[:0]
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.Over():
			over = true
		case e := <-w.Events():
			batch = append(batch, eventOf(e))
		}
		for more := true; more && len(batch) < watchBatch; {
			select {
			case e := <-w.Events():
				over = false // the rest comes with the next batch
				batch = append(batch, eventOf(e))
			default:
				more = false
			}
		}
		names.fill(batch)
		if n := w.Lost(); n > 0 { // the lost events may belong before the batch or after it
			batch = append(batch, control.Event{Event: control.EventLost, Time: time.Now(), Lost: n})
		}
		if len(batch) > 0 {
			if err := send(batch); err != nil {
				return err
			}
		}
		if over {
			return nil
		}
	}
}

func eventOf(e route.Event) control.Event {
	f := flowOf(e.Flow)
	out := control.Event{Event: e.Kind.String(), Time: e.At, Flow: &f}
	if e.Err != nil {
		out.Error = e.Err.Error()
	}
	return out
}

// eventNames adds the programs of flows to their events. The socket of an ended flow is gone, so the program that was
// found earlier is used.
type eventNames struct {
	programs *programs
	live     map[uint64]program
}

func (n *eventNames) fill(batch []control.Event) {
	var ask []control.Flow
	var at []*control.Flow
	for i := range batch {
		f := batch[i].Flow
		if k, ok := n.live[f.ID]; ok && f.PID == 0 {
			f.PID, f.Exe = k.pid, k.exe
		}
		if f.PID == 0 && batch[i].Event != control.EventClosed {
			ask, at = append(ask, *f), append(at, f)
		}
	}
	n.programs.name(ask)
	for i, f := range ask {
		at[i].PID, at[i].Exe = f.PID, f.Exe
	}
	for i := range batch {
		f := batch[i].Flow
		switch {
		case batch[i].Event == control.EventClosed:
			if k, ok := n.live[f.ID]; ok && f.PID == 0 {
				f.PID, f.Exe = k.pid, k.exe
			}
			delete(n.live, f.ID)
		case f.PID != 0:
			if len(n.live) >= maxPrograms { // the closing events of some flows were lost
				clear(n.live)
			}
			n.live[f.ID] = program{pid: f.PID, exe: f.Exe}
		}
	}
}
