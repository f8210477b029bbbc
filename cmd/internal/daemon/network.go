package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/tun/netns"
)

const (
	// settleAfter is how long the network must be quiet after a change, because changes rarely come alone.
	settleAfter = 500 * time.Millisecond
	// settleMost limits that wait, for a network that changes all the time.
	settleMost = 5 * time.Second
	// sleepCheck is how often run checks whether the host was asleep.
	sleepCheck = 5 * time.Second
)

// settling reports several changes in quick succession once. It belongs to one goroutine, except changed.
type settling struct {
	news   chan struct{}
	due    <-chan time.Time // nil: nothing has changed
	latest time.Time        // due is not deferred beyond this
}

func newSettling() *settling { return &settling{news: make(chan struct{}, 1)} }

// changed reports a change. It does not block and may be called from any goroutine.
func (s *settling) changed() {
	select {
	case s.news <- struct{}{}:
	default: // one is already waiting
	}
}

// noted must be called after a receive from news. due fires when the network has been quiet.
func (s *settling) noted() {
	now := time.Now()
	if s.due == nil {
		s.latest = now.Add(settleMost)
	}
	s.due = time.After(min(settleAfter, s.latest.Sub(now)))
}

// networkChanged must be called when due fires: servers are looked up again, and associations are made again.
func (p *plane) networkChanged(s *settling) {
	s.due = nil
	p.log.Info("the network changed: resolving the proxy's name and making the associations again")
	p.renew()
}

// followNetwork reports to s when the route from the calling thread's network namespace to the proxy may have
// changed, or when the host was asleep, until end is called.
func followNetwork(s *settling, log *slog.Logger) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var ran sync.WaitGroup
	ran.Go(func() { (&process.Pulse{Every: sleepCheck}).Run(ctx, func() {}, s.changed) })
	w, err := netns.NewWatch(log)
	if err != nil {
		log.Warn("cannot watch the network: after a change UDP may stop for a while", "err", err)
		return func() { cancel(); ran.Wait() }
	}
	ran.Go(func() {
		w.Run(func(c netns.Change) {
			if leadsElsewhere(c) {
				s.changed()
			}
		})
	})
	return func() { cancel(); w.Close(); ran.Wait() }
}

// leadsElsewhere reports whether c may affect how a proxy is reached. Link-local addresses do not count, because
// every started container adds one.
func leadsElsewhere(c netns.Change) bool {
	a := c.Addr.Addr()
	return c.Lost || c.DefaultRoute || c.Addr.IsValid() && !a.IsLoopback() && !a.IsLinkLocalUnicast()
}
