package process

import (
	"cmp"
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pulseEvery = time.Second
	// pulseFresh is how old the last answer of the data plane may be for it to count as alive.
	pulseFresh = 5 * time.Second
	// sleptFor is how much the clock that counts sleep must gain on the one that does not.
	sleptFor = 5 * time.Second
)

// Pulse checks regularly whether the data plane answers, and whether the host was asleep.
type Pulse struct {
	last   atomic.Int64         // on the clock that stops in sleep, ns; 0: never
	asleep func() time.Duration // since boot; nil: as the kernel reports
	Every  time.Duration        // 0: pulseEvery
}

// Run checks until ctx ends. look may hang; Fresh then becomes false.
func (p *Pulse) Run(ctx context.Context, look, woke func()) {
	tick := time.NewTicker(cmp.Or(p.Every, pulseEvery))
	defer tick.Stop()
	slept := p.asleep
	if slept == nil {
		slept = asleep
	}
	before := slept()
	for {
		p.Beat(look)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now := slept(); now-before > sleptFor {
			before = now
			woke()
		}
	}
}

func (p *Pulse) Beat(look func()) {
	look()
	p.last.Store(int64(clock(unix.CLOCK_MONOTONIC)))
}

// Fresh reports whether the data plane has answered recently.
func (p *Pulse) Fresh() bool {
	last := p.last.Load()
	return last != 0 && clock(unix.CLOCK_MONOTONIC)-time.Duration(last) < pulseFresh
}

func clock(id int32) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(id, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// asleep returns how long the host has been suspended since it was booted.
func asleep() time.Duration { return clock(unix.CLOCK_BOOTTIME) - clock(unix.CLOCK_MONOTONIC) }
