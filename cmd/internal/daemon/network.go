package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/viasocks/viasocks/tun/netns"
)

const (
	// settleAfter is how long the network must have been quiet after a change, which hardly comes alone.
	settleAfter = 500 * time.Millisecond
	// settleMost bounds that: a network that changes all the time is acted upon too.
	settleMost = 5 * time.Second
	// sleepCheck is how often run asks whether the host was asleep.
	sleepCheck = 5 * time.Second
)

// settling tells once of changes that come together. It belongs to one goroutine, except changed.
type settling struct {
	news   chan struct{}
	due    <-chan time.Time // nil: nothing has changed
	latest time.Time        // due is not put off longer
}

func newSettling() *settling { return &settling{news: make(chan struct{}, 1)} }

// changed is told of a change. It does not block, and any goroutine may call it.
func (s *settling) changed() {
	select {
	case s.news <- struct{}{}:
	default: // one is waiting already
	}
}

// noted is called with what news gave: due comes when it has been quiet.
func (s *settling) noted() {
	now := time.Now()
	if s.due == nil {
		s.latest = now.Add(settleMost)
	}
	s.due = time.After(min(settleAfter, s.latest.Sub(now)))
}

// networkChanged is what follows when due came: servers are looked up again and associations are made anew.
func (p *plane) networkChanged(s *settling) {
	s.due = nil
	p.log.Info("the network changed: resolving the proxy's name and making the associations again")
	p.renew()
}

// followNetwork tells s when the way from the calling thread's network namespace to the proxy may be another one, until end is
// called, or when the host was asleep.
func followNetwork(s *settling, log *slog.Logger) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var ran sync.WaitGroup
	ran.Go(func() { (&pulse{every: sleepCheck}).run(ctx, func() {}, s.changed) })
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

// leadsElsewhere reports whether c may concern how a proxy is reached. Link-local addresses do not count: each container that is
// started brings one.
func leadsElsewhere(c netns.Change) bool {
	a := c.Addr.Addr()
	return c.Lost || c.DefaultRoute || c.Addr.IsValid() && !a.IsLoopback() && !a.IsLinkLocalUnicast()
}
