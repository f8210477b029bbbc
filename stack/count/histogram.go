package count

import (
	"sync/atomic"
	"time"
)

// Bounds are the upper ends of the buckets of a Histogram. A separate bucket counts longer durations.
var Bounds = [...]time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second,
}

// Histogram counts durations by their length. It can be a field of a table.
type Histogram[T any] struct {
	Buckets     [len(Bounds) + 1]T
	Nanoseconds T // sum of all durations
}

// Observe counts one duration. It costs two atomic additions.
func Observe(h *Histogram[atomic.Uint64], d time.Duration) {
	i := 0
	for i < len(Bounds) && d > Bounds[i] {
		i++
	}
	h.Buckets[i].Add(1)
	h.Nanoseconds.Add(uint64(max(d, 0)))
}

// Count returns how many durations were counted.
func (h *Histogram[T]) Count() (n uint64) {
	for i := range h.Buckets {
		switch b := any(&h.Buckets[i]).(type) {
		case *uint64:
			n += *b
		case *atomic.Uint64:
			n += b.Load()
		}
	}
	return n
}
