package count

import (
	"slices"
	"sync/atomic"
	"testing"
)

type Inner[T any] struct {
	Lost T `metric:"lost_total" label:"reason=why" help:"What was lost." lost:"all of it"`
}

type table[T any] struct {
	Seen T `metric:"seen_total" help:"What was seen."`
	Inner[T]
	Silent T
}

type snapshot struct {
	table[uint64]
	Now  int64 `metric:"now" help:"What there is."`
	Also struct {
		Deep int `metric:"deep" label:"at=bottom"`
	}
}

func TestAdd(t *testing.T) {
	var live, more table[atomic.Uint64]
	live.Seen.Add(3)
	live.Lost.Add(4)
	live.Silent.Add(5)
	var seen table[uint64]
	Add(&seen, &live)
	Add(&seen, &live)
	want := table[uint64]{Seen: 6, Inner: Inner[uint64]{Lost: 8}, Silent: 10}
	if seen != want {
		t.Errorf("plain from atomic: %+v", seen)
	}
	Add(&more, &seen)
	if more.Seen.Load() != 6 || more.Lost.Load() != 8 || more.Silent.Load() != 10 {
		t.Error("atomic from plain: a field was not added")
	}
	defer func() {
		if recover() == nil {
			t.Error("two different tables were added")
		}
	}()
	Add(&seen, &Inner[uint64]{})
}

func TestEach(t *testing.T) {
	s := snapshot{table: table[uint64]{Seen: 1, Inner: Inner[uint64]{Lost: 2}, Silent: 3}, Now: -4}
	s.Also.Deep = 5
	want := []Metric{
		{Name: "seen_total", Help: "What was seen.", Value: 1},
		{Name: "lost_total", Label: "reason=why", Help: "What was lost.", Lost: "all of it", Value: 2},
		{Name: "now", Help: "What there is.", Gauge: true, Value: -4},
		{Name: "deep", Label: "at=bottom", Gauge: true, Value: 5},
	}
	var got []Metric
	Each(s, func(m Metric) { got = append(got, m) })
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if key := got[1].Key(); key != "lost_total{reason=why}" || got[0].Key() != "seen_total" {
		t.Errorf("key %q", key)
	}
}
