package process

import (
	"context"
	"log/slog"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// With GOGC at 400 the collector is lazy: the garbage of a burst of connections stays until the heap has grown to
// five times the live data, which never happens on an idle host. After a burst, when it is quiet again, we therefore
// collect.
const (
	quietEvery = 5 * time.Second
	// quietBytes allocated between two checks do not count as load.
	quietBytes = 2 << 20
	// burstBytes of garbage since the last time are worth a collection, which takes some 1 ms for each 10 MB of live
	// data; or an eighth of the live data if that is more. The amount allocated shows how much garbage there may be,
	// except that of ended flows, whose end allocates almost nothing.
	burstBytes = 2 << 20
	flowBytes  = 6 << 10
	// If almost nothing was allocated between two checks, the burst is over, and less garbage is enough for a
	// collection.
	calmBytes = 64 << 10
	restBytes = 256 << 10
	// A host that is never quiet is also collected, though rarely, if most of its heap is garbage or empty.
	busyEvery = time.Minute
	busyHeap  = 64 << 20
)

// GiveBack returns memory to the kernel after bursts, until ctx ends. ended returns how many flows have ended so far.
// renew releases what a burst has left that is not garbage, and reports whether there was any.
func GiveBack(ctx context.Context, ended func() uint64, renew func() bool, log *slog.Logger) {
	tick := time.NewTicker(quietEvery)
	defer tick.Stop()
	var g gauge
	dropCode()
	setUp := false
	before := g.read()
	done, doneAt, flows := before.allocated, time.Now(), ended()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !setUp { // what started beside and after this function has ended by now, too
			dropCode()
			setUp = true
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
		runtime.GC() // the content of a sync.Pool survives one collection
		debug.FreeOSMemory()
		dropCode()
		after := g.read()
		log.LogAttrs(ctx, slog.LevelDebug, "memory given back", slog.Uint64("from", now.held), slog.Uint64("to", after.held),
			slog.Int("goroutines", runtime.NumGoroutine()))
		before = after
		done, doneAt = before.allocated, time.Now()
	}
}

// worthIt reports whether it is quiet and there is enough garbage for a collection. lately is what was allocated
// since the last check.
func worthIt(now heapState, lately, garbage uint64) bool {
	return lately < quietBytes && garbage > max(burstBytes, now.live/8) ||
		lately < calmBytes && garbage > max(restBytes, now.live/64)
}

// gauge reads three values in bytes: the total allocated, the memory held from the kernel, and the live data at the
// last collection.
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
