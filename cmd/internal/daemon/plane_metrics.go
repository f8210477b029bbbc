package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/metrics"
	"github.com/viasocks/viasocks/cmd/internal/privsock"
	"github.com/viasocks/viasocks/stack/count"
)

// measured contains the metrics that are not in the tables of the data plane.
type measured struct {
	Ready      int                     `metric:"ready" help:"1 while traffic is carried."`
	TUNDropped uint64                  `metric:"tun_dropped_total" help:"Packets of programs that the TUN had no room for."`
	Lag        count.Histogram[uint64] `metric:"loop_lag_seconds" help:"Time until an event loop does what it is told, once a second."`
}

// watched is the source of the metrics.
type watched struct {
	plane   func() *plane // returns nil if there is none now
	ready   func() bool
	dropped func() (uint64, error) // by the TUN
}

// serveMetrics serves the metrics, if cfg has an address for them, until end is called. Without an address, nothing is
// measured and no goroutine runs.
func serveMetrics(cfg *config.Config, w watched, version string, log *slog.Logger) (end func(), err error) {
	if cfg.Metrics.IsZero() {
		return func() {}, nil
	}
	var lag count.Histogram[atomic.Uint64]
	srv, err := metrics.Listen(metrics.Options{
		Address: cfg.Metrics, Version: version, Log: log, Source: func() metrics.Source { return w.source(&lag) },
	})
	if err != nil {
		return nil, err
	}
	var ran sync.WaitGroup
	over := make(chan struct{})
	ran.Go(func() { w.watchLag(&lag, over) })
	return sync.OnceFunc(func() {
		close(over)
		srv.Close()
		ran.Wait()
	}), nil
}

// source takes a snapshot.
func (w *watched) source(lag *count.Histogram[atomic.Uint64]) metrics.Source {
	var m measured
	count.Add(&m.Lag, lag)
	if w.ready() {
		m.Ready = 1
	}
	m.TUNDropped, _ = w.dropped() // 0 if it cannot be read
	p := w.plane()
	return metrics.Source{Of: p, Each: func(f func(count.Metric)) {
		count.Each(m, f)
		if p != nil {
			c := p.counters()
			c.each(f)
		}
	}}
}

// lagEvery is the interval between two measurements of the loops. A loop that has not yet answered is not asked again.
const lagEvery = time.Second

// watchLag measures how long each loop takes to run a function.
func (w *watched) watchLag(lag *count.Histogram[atomic.Uint64], over <-chan struct{}) {
	tick := time.NewTicker(lagEvery)
	defer tick.Stop()
	busy := map[any]*atomic.Bool{}
	for of := (*plane)(nil); ; {
		select {
		case <-over:
			return
		case <-tick.C:
		}
		p := w.plane()
		if p == nil {
			continue
		}
		if p != of {
			of = p
			clear(busy)
		}
		for _, l := range p.loops {
			asked := busy[l]
			if asked == nil {
				asked = new(atomic.Bool)
				busy[l] = asked
			}
			if begin := time.Now(); !asked.Swap(true) {
				l.Post(func() {
					count.Observe(lag, time.Since(begin))
					asked.Store(false)
				})
			}
		}
	}
}

// metricsRecord is a file beside the control socket. It contains the path of the metrics socket, so that the socket can
// be removed after viasocks was killed.
func metricsRecord(control string) string { return strings.TrimSuffix(control, ".sock") + ".metrics" }

// recordMetrics writes this file; end removes it.
func recordMetrics(control string, at metrics.Address) (end func(), err error) {
	if at.Path == "" {
		return func() {}, nil
	}
	record := metricsRecord(control)
	if err := os.WriteFile(record, []byte(at.Path), 0o600); err != nil {
		return nil, fmt.Errorf("cannot note the metrics socket: %w", err)
	}
	return func() { os.Remove(record) }, nil
}

// forgetMetrics removes the metrics socket of a viasocks that was killed, and returns its path. The caller holds the
// lock.
func forgetMetrics(control string) (path string, err error) {
	record := metricsRecord(control)
	text, err := os.ReadFile(record)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if path = string(text); filepath.IsAbs(path) {
		if _, err = os.Lstat(path); err != nil {
			path = ""
		} else if err := privsock.RemoveStale(path); err != nil {
			path = "" // another process uses it now
		}
	}
	return path, os.Remove(record)
}
