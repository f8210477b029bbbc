package daemon

import (
	"testing"
	"time"
)

// TestMendDelay: the first time at once, then later and later, and at once again when it was calm.
func TestMendDelay(t *testing.T) {
	var td tended
	now := time.Now()
	for i, want := range []time.Duration{0, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second,
		4 * time.Second, 8 * time.Second,
		16 * time.Second, 30 * time.Second, 30 * time.Second} {
		got := td.delay(now)
		if got != want {
			t.Errorf("time %d: %v, want %v", i, got, want)
		}
		now = now.Add(got)
		td.mended(now)
	}
	for range 1000 { // no overflow
		td.mended(now)
	}
	if got := td.delay(now); got != mendMost {
		t.Errorf("after many: %v", got)
	}
	if got := td.delay(now.Add(mendCalm + time.Second)); got != 0 {
		t.Errorf("after a calm: %v", got)
	}
}
