package count

import (
	"slices"
	"sync/atomic"
	"testing"
	"time"
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

type times[T any] struct {
	Took Histogram[T] `metric:"took_seconds" label:"a=b,c=d" help:"How long it took."`
}

func TestHistogram(t *testing.T) {
	var live times[atomic.Uint64]
	for _, d := range []time.Duration{-1, 0, time.Millisecond, time.Millisecond + 1, 30 * time.Second, time.Hour} {
		Observe(&live.Took, d)
	}
	var seen times[uint64]
	Add(&seen, &live)
	want := Histogram[uint64]{Nanoseconds: uint64(time.Hour + 30*time.Second + 2*time.Millisecond + 1)}
	want.Buckets[0], want.Buckets[1], want.Buckets[13], want.Buckets[14] = 3, 1, 1, 1
	if seen.Took != want || live.Took.Count() != 6 || seen.Took.Count() != 6 {
		t.Errorf("got %+v", seen.Took)
	}
	Each(seen, func(m Metric) {
		if m.Key() != "took_seconds{a=b,c=d}" || m.Times == nil || *m.Times != want {
			t.Errorf("got %+v", m)
		}
	})
}
