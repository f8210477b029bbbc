package process

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

func TestPulse(t *testing.T) {
	var p Pulse
	if p.Fresh() {
		t.Error("fresh before the first look")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var looks atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.Run(ctx, func() { looks.Add(1) }, func() { t.Error("it was not asleep") })
	}()
	testkit.Eventually(t, "the first look", func() bool { return looks.Load() > 0 && p.Fresh() })
	cancel()
	<-done
	p.last.Store(p.last.Load() - int64(pulseFresh))
	if p.Fresh() {
		t.Error("fresh after nobody looked")
	}
}

// A host that was suspended is told once for each time, and one that was not never.
func TestWoke(t *testing.T) {
	var clock, woke atomic.Int64
	p := Pulse{Every: time.Millisecond, asleep: func() time.Duration { return time.Duration(clock.Load()) }}
	ctx, cancel := context.WithCancel(context.Background())
	var looks atomic.Int64
	done := make(chan struct{})
	go func() { defer close(done); p.Run(ctx, func() { looks.Add(1) }, func() { woke.Add(1) }) }()
	defer func() { cancel(); <-done }()
	passes := func() { // two looks: all that came before was seen
		n := looks.Load()
		testkit.Eventually(t, "two looks", func() bool { return looks.Load() >= n+3 })
	}
	for i, tt := range []struct {
		asleep time.Duration
		want   int64
	}{{0, 0}, {4 * time.Second, 0}, {10 * time.Second, 1}, {11 * time.Second, 1}, {9 * time.Hour, 2}, {9 * time.Hour, 2}} {
		passes()
		clock.Store(int64(tt.asleep))
		passes()
		if woke.Load() != tt.want {
			t.Errorf("%d: asleep for %v in all: woke %d times, want %d", i, tt.asleep, woke.Load(), tt.want)
		}
	}
}
