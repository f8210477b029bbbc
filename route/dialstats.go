package route

import (
	"sync/atomic"
	"time"
)

// dialStats counts the dials of an upstream, for status.
type dialStats struct {
	granted, failed atomic.Uint64
	latency         atomic.Int64 // nanoseconds, see latencyShare
}

// latencyShare is the weight of a new time in the average: 1/8, as for the round-trip times of TCP (RFC 6298).
const latencyShare = 8

// grant records that a dial was granted, and how long after the first packet of its flow.
func (d *dialStats) grant(took time.Duration) {
	d.granted.Add(1)
	old := d.latency.Load()
	next := int64(took)
	if old != 0 {
		next = old + (next-old)/latencyShare
	}
	d.latency.Store(max(next, 1)) // it does not matter if two goroutines lose a value
}
