package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"time"
)

// onSignals calls got for each of signals until end is called.
func onSignals(got func(os.Signal), signals ...os.Signal) (end func()) {
	c := make(chan os.Signal, 4)
	signal.Notify(c, signals...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range c {
			got(s)
		}
	}()
	return func() {
		signal.Stop(c)
		close(c)
		<-done
	}
}

// rebuilds limits how often a data plane that ends by itself, for example because the TUN was deleted, is built again.
type rebuilds struct {
	log *slog.Logger
	at  []time.Time // of the last ones
}

// again builds again what ended with the error why, unless that was done too often lately.
func (r *rebuilds) again(why error, build func() error) error {
	now := time.Now()
	for len(r.at) > 0 && now.Sub(r.at[0]) > rebuildWithin {
		r.at = r.at[1:]
	}
	if len(r.at) == rebuildMost {
		return fmt.Errorf("%w (%d times within %v)", why, rebuildMost+1, rebuildWithin)
	}
	r.at = append(r.at, now)
	r.log.Warn("the data plane ended: starting it again", "err", why)
	if err := build(); err != nil {
		return fmt.Errorf("%w; and then: %w", why, err)
	}
	r.log.Info("the data plane works again", "took", time.Since(now).Round(time.Millisecond))
	return nil
}
