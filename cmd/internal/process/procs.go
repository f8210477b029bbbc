package process

import (
	"context"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// With more processors than it can use, the Go scheduler wakes threads to look for work that does not exist, for each
// goroutine that becomes ready. On two cores that costs 1.37 CPU seconds per GB instead of 1.20 with one, and 154 µs
// instead of 126 for a connection, and the program and the proxy need those cores. With only one processor, eight
// flows reach 5.5 Gbit/s instead of 7.1. The number of processors therefore follows the load.
const (
	procsEvery = 250 * time.Millisecond
	// procsMore is the share of the current processors that must be busy before their number is doubled. procsFewer
	// is the share of half of them below which it is halved: what runs on two takes a little more than on one.
	procsMore  = 0.80
	procsFewer = 0.60
)

// FollowLoad sets GOMAXPROCS between 1 and its current value until ctx ends, and then restores it. It does not
// override GOMAXPROCS in the environment.
func FollowLoad(ctx context.Context) {
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

// procsFor returns the number of processors for a load of cores when there are n now.
func procsFor(n, most int, cores float64) int {
	switch {
	case cores > procsMore*float64(n):
		return min(2*n, most)
	case n > 1 && cores < procsFewer*float64(n)/2:
		return (n + 1) / 2
	}
	return n
}

// cpuTime returns the user and system time of this process.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
