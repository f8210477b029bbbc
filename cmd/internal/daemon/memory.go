package daemon

import (
	"context"
	"log/slog"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// With GOGC at 400 the collector is lazy: what a burst of connections left behind stays until the heap has grown
// five times what lives, which an idle host never does. So after a burst, when it is quiet again, we collect.
const (
	quietEvery = 5 * time.Second
	// quietBytes allocated between two looks is no load worth waiting for.
	quietBytes = 2 << 20
	// burstBytes of garbage since the last time are worth a collection, some 1 ms for each 10 MB that lives; and an eighth
	// of what lives, where that is more. What was allocated tells how much garbage there may be, but not that of flows
	// that end: their end allocates next to nothing.
	burstBytes = 2 << 20
	flowBytes  = 6 << 10
	// When next to nothing is allocated between two looks, the burst is over, and what its end left is worth it sooner.
	calmBytes = 64 << 10
	restBytes = 256 << 10
	// A host that is never quiet is collected too, seldom, when most of its heap is garbage or empty.
	busyEvery = time.Minute
	busyHeap  = 64 << 20
)

// giveBack returns memory to the kernel after bursts, until ctx ends. ended is how many flows have ended so far; renew gives
// up what a burst left that is no garbage, and says whether there was any.
func giveBack(ctx context.Context, ended func() uint64, renew func() bool, log *slog.Logger) {
	tick := time.NewTicker(quietEvery)
	defer tick.Stop()
	var g gauge
	dropCode() // all is set up by now
	before := g.read()
	done, doneAt, flows := before.allocated, time.Now(), ended()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := g.read()
		garbage := now.allocated - done + flowBytes*(ended()-flows)
		lately := now.allocated - before.allocated
		quiet := lately < quietBytes && renew() || worthIt(now, lately, garbage)
		busy := time.Since(doneAt) > busyEvery && now.held > busyHeap && now.held > 4*now.live
		before = now
		if !quiet && !busy {
			continue
		}
		flows = ended()
		runtime.GC() // what is in a sync.Pool outlives one collection
		debug.FreeOSMemory()
		dropCode()
		after := g.read()
		log.LogAttrs(ctx, slog.LevelDebug, "memory given back", slog.Uint64("from", now.held), slog.Uint64("to", after.held),
			slog.Int("goroutines", runtime.NumGoroutine()))
		before = after
		done, doneAt = before.allocated, time.Now()
	}
}

// worthIt reports whether it is quiet, and there is garbage worth a collection. lately is what was allocated since the
// last look.
func worthIt(now heapState, lately, garbage uint64) bool {
	return lately < quietBytes && garbage > max(burstBytes, now.live/8) ||
		lately < calmBytes && garbage > max(restBytes, now.live/64)
}

// gauge reads the three figures, in bytes: allocated ever, held from the kernel, alive at the last collection.
type gauge struct{ samples []metrics.Sample }

type heapState struct{ allocated, held, live uint64 }

func (g *gauge) read() heapState {
	if g.samples == nil {
		for _, name := range []string{
			"/gc/heap/allocs:bytes", "/gc/heap/live:bytes",
			"/memory/classes/heap/objects:bytes", "/memory/classes/heap/unused:bytes", "/memory/classes/heap/free:bytes",
		} {
			g.samples = append(g.samples, metrics.Sample{Name: name})
		}
	}
	metrics.Read(g.samples)
	v := make([]uint64, len(g.samples))
	for i, s := range g.samples {
		if s.Value.Kind() == metrics.KindUint64 {
			v[i] = s.Value.Uint64()
		}
	}
	return heapState{allocated: v[0], live: v[1], held: v[2] + v[3] + v[4]}
}
