package daemon

import (
	"context"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// With more processors than it can fill the Go scheduler wakes threads to look for work that is not there, for each
// goroutine that becomes ready: on two cores 1.37 CPU seconds per GB against 1.20 with one, 154 µs against 126 for a
// connection, and the program and the proxy want those cores. With one processor only, eight flows reach 5.5 Gbit/s in
// place of 7.1. So there are as many as there is work for.
const (
	procsEvery = 250 * time.Millisecond
	// procsMore is the share of the present processors that must be in use for twice as many, procsFewer the share of
	// half of them that may be in use for half as many: what runs on two takes a little more than on one.
	procsMore  = 0.80
	procsFewer = 0.60
)

// followLoad sets GOMAXPROCS between 1 and what it is now, until ctx ends, and then sets it back. A GOMAXPROCS in the
// environment is the user's word and stays.
func followLoad(ctx context.Context) {
	most := runtime.GOMAXPROCS(0)
	if most == 1 || os.Getenv("GOMAXPROCS") != "" {
		return
	}
	defer runtime.GOMAXPROCS(most)
	n := 1
	runtime.GOMAXPROCS(n)
	tick := time.NewTicker(procsEvery)
	defer tick.Stop()
	used, at := cpuTime(), time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		usedNow, now := cpuTime(), time.Now()
		cores := (usedNow - used).Seconds() / now.Sub(at).Seconds()
		used, at = usedNow, now
		if want := procsFor(n, most, cores); want != n {
			n = want
			runtime.GOMAXPROCS(n)
		}
	}
}

// procsFor is how many processors suit a load of cores when there are n now.
func procsFor(n, most int, cores float64) int {
	switch {
	case cores > procsMore*float64(n):
		return min(2*n, most)
	case n > 1 && cores < procsFewer*float64(n)/2:
		return (n + 1) / 2
	}
	return n
}

// cpuTime is what this process has used, user and system.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
