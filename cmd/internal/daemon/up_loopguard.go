package daemon

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/owner"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun/netns"
)

// loopGuard detects when connections of a proxy on this host come back to it, and then refuses them. Without such a
// proxy it costs a flow nothing. Until a loop is detected, it checks samples outside of the data plane: a flow costs
// one attempt to queue it.
type loopGuard struct {
	watched atomic.Pointer[[]localProxy] // nil: none
	looping atomic.Bool
	samples chan flow.Flow
	seen    chan localProxy // a loop was detected

	mu       sync.Mutex // guards the fields below: see processesOf
	pids     []string
	listener uint32
	listed   time.Time
}

// The minimum and maximum time between the checks of two samples. Each check may read all of /proc.
const sampleOften, sampleSeldom = 20 * time.Millisecond, time.Second

func newLoopGuard() *loopGuard {
	return &loopGuard{samples: make(chan flow.Flow, 8), seen: make(chan localProxy, 1)}
}

// watch sets the proxies to look for, and starts again.
func (g *loopGuard) watch(proxies []localProxy) {
	g.looping.Store(false)
	if len(proxies) == 0 {
		g.watched.Store(nil)
		return
	}
	g.watched.Store(&proxies)
}

// comesBack reports whether a flow is a proxy's own. It is the function for route.Config.ComesBack.
func (g *loopGuard) comesBack(f flow.Flow) bool {
	if g.watched.Load() == nil {
		return false
	}
	if !g.looping.Load() {
		select {
		case g.samples <- f:
		default:
		}
		return false
	}
	diag, err := netns.OpenDiag()
	if err != nil {
		return false
	}
	defer diag.Close()
	_, own := g.ownerOf(diag, f)
	return own
}

// ownerOf finds the proxy that made the flow's socket: the listening process or a child of it.
func (g *loopGuard) ownerOf(diag *netns.Diag, f flow.Flow) (localProxy, bool) {
	watched := g.watched.Load()
	if watched == nil {
		return localProxy{}, false
	}
	o, found, err := diag.Owner(uint8(f.Proto), f.Src, f.Dst)
	if err != nil || !found {
		return localProxy{}, false
	}
	for _, p := range *watched {
		p.find(diag) // it may have started since
		if p.owner == (netns.Owner{}) || o.Cgroup != p.owner.Cgroup {
			continue
		}
		if slices.ContainsFunc(g.processesOf(p.owner.Inode), func(pid string) bool { return owner.HasSocket(pid, o.Inode) }) {
			return p, true
		}
	}
	return localProxy{}, false
}

// processesOf lists the processes that have the listening socket open, and their descendants, at most a second old:
// finding them requires reading all of /proc.
func (g *loopGuard) processesOf(listener uint32) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.listener != listener || time.Since(g.listed) > time.Second {
		g.pids, g.listener, g.listed = owner.Descendants(owner.Holders(listener)), listener, time.Now()
	}
	return g.pids
}

// run checks samples until ctx ends.
func (g *loopGuard) run(ctx context.Context) {
	diag, err := netns.OpenDiag()
	if err != nil {
		return
	}
	defer diag.Close()
	pause := sampleOften
	for {
		var f flow.Flow
		select {
		case <-ctx.Done():
			return
		case f = <-g.samples:
		}
		if p, own := g.ownerOf(diag, f); own && !g.looping.Swap(true) {
			select {
			case g.seen <- p:
			default:
			}
			pause = sampleOften
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		pause = min(pause+pause/8, sampleSeldom)
	}
}
