package loop

import (
	"testing"
	"time"
)

func TestTimers(t *testing.T) {
	var h timers
	var all []*Node
	for i := range 500 {
		n := &Node{heapAt: -1}
		all = append(all, n)
		h.set(n, time.Duration((i*7919)%1009))
	}
	for i, n := range all {
		switch i % 3 {
		case 0:
			h.set(n, time.Duration((i*104729)%997))
		case 1:
			h.remove(n)
			h.remove(n)
		}
	}
	last := time.Duration(-1)
	n := 0
	for ; len(h) > 0; n++ {
		if h[0].when < last || h[0].heapAt != 0 {
			t.Fatalf("%v after %v", h[0].when, last)
		}
		last = h[0].when
		h.remove(h[0])
	}
	if n != 333 {
		t.Errorf("%d were left", n)
	}
}

// TestTimersShrink: what a burst made is given back when little is left of it, and what is left stays.
func TestTimersShrink(t *testing.T) {
	const n = 2 * keepTimers
	var h timers
	var all []*Node
	for i := range n {
		m := &Node{heapAt: -1}
		all = append(all, m)
		h.set(m, time.Duration(n-i))
	}
	for _, m := range all[:n-1] {
		h.remove(m)
	}
	if len(h) != 1 || cap(h) > keepTimers || h[0] != all[n-1] {
		t.Errorf("%d timers, room for %d", len(h), cap(h))
	}
}
