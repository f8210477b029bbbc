package daemon

import (
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// The end of a flow has the program that the flow had, though the socket is gone by then.
func TestEventNames(t *testing.T) {
	from := &countedOwners{}
	n := eventNames{newPrograms(from), map[uint64]program{}}
	event := func(kind string, id uint64, src string) control.Event {
		return control.Event{Event: kind, Flow: &control.Flow{ID: id, Proto: "tcp", Src: src, Dst: "203.0.113.1:80"}}
	}
	const known, unknown = "198.18.0.1:2000", "198.18.0.1:5"
	batches := [][]control.Event{
		{event(control.EventOpened, 1, known), event(control.EventOpened, 2, unknown)},
		{event(control.EventDialled, 1, known), event(control.EventOpened, 3, known), event(control.EventClosed, 3, known)},
		{event(control.EventClosed, 1, unknown), event(control.EventClosed, 2, unknown), event(control.EventClosed, 4, known)},
	}
	for i, want := range [][]int{{2000, 0}, {2000, 2000, 2000}, {2000, 0, 0}} {
		n.fill(batches[i])
		for j := range want {
			if f := batches[i][j].Flow; f.PID != want[j] {
				t.Errorf("batch %d: %+v, want process %d", i, f, want[j])
			}
		}
	}
	if len(n.live) != 0 {
		t.Errorf("flows that have ended are remembered: %v", n.live)
	}
	if from.asked != 3 {
		t.Errorf("%d questions", from.asked)
	}
}
