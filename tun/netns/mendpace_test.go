package netns

import (
	"testing"
	"time"
)

// TestMendDelay: the first time at once, then later and later, and at once again when it was calm.
func TestMendDelay(t *testing.T) {
	var p MendPace
	now := time.Now()
	for i, want := range []time.Duration{0, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second,
		4 * time.Second, 8 * time.Second,
		16 * time.Second, 30 * time.Second, 30 * time.Second} {
		got := p.Delay(now)
		if got != want {
			t.Errorf("time %d: %v, want %v", i, got, want)
		}
		now = now.Add(got)
		p.Mended(now)
	}
	for range 1000 { // no overflow
		p.Mended(now)
	}
	if got := p.Delay(now); got != mendMost {
		t.Errorf("after many: %v", got)
	}
	if got := p.Delay(now.Add(mendCalm + time.Second)); got != 0 {
		t.Errorf("after a calm: %v", got)
	}
}
