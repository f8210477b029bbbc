package daemon

import (
	"context"
	"errors"
	"sync"
	"time"
)

// How long --wait waits between two looks at a proxy that is not there: twice as long each time, from the first to the last. The
// pauses begin anew when the network or the configuration changes.
const (
	waitFirst = time.Second
	waitMost  = 30 * time.Second
)

// waiter looks again and again for a proxy that is not there yet, while the host is closed. Its methods are of the goroutine that
// is in up.live.
type waiter struct {
	u     *up
	ctx   context.Context // of the probes
	ran   *sync.WaitGroup // they are waited for
	pause time.Duration
	again *time.Timer
	tried chan error // has what the probe that runs finds
	busy  bool       // one runs
}

// newWaiter is one that waits from the start on if the first look failed with u.waiting, and else never does.
func (u *up) newWaiter(ctx context.Context, ran *sync.WaitGroup) *waiter {
	w := &waiter{u: u, ctx: ctx, ran: ran, pause: waitFirst, again: time.NewTimer(waitFirst), tried: make(chan error, 1)}
	if u.waitsFor() == nil {
		w.again.Stop()
	}
	return w
}

// try looks now. The result comes by w.tried.
func (w *waiter) try() {
	if w.busy {
		return
	}
	w.again.Stop()
	w.busy = true
	cfg := w.u.config()
	w.ran.Go(func() { w.tried <- probe(w.ctx, cfg, w.u.dial) })
}

// changed looks at once, since what it waits for may be another thing now; it does nothing when it does not wait.
func (w *waiter) changed() {
	if w.u.waitsFor() != nil {
		w.pause = waitFirst
		w.try()
	}
}

// found takes what a probe found, and reports whether the proxy is there.
func (w *waiter) found(err error) bool {
	w.busy = false
	if err == nil {
		w.u.mu.Lock()
		w.u.waiting = nil
		w.u.mu.Unlock()
		return true
	}
	w.u.waitFor(err)
	w.again.Reset(w.pause)
	w.pause = min(2*w.pause, waitMost)
	return false
}

func (w *waiter) close() { w.again.Stop() }

// waitFor says that the proxy is waited for since err: in the status, to systemd, and in the log when it is another err.
func (u *up) waitFor(err error) {
	u.mu.Lock()
	said := u.waiting != nil && u.waiting.Error() == err.Error()
	u.waiting = err
	u.mu.Unlock()
	if !said {
		u.log.Warn("waiting for the proxy; the host is closed until it can be reached", "err", err)
	}
	u.notify.waiting("waits for the proxy, the host is closed: "+err.Error(), waitMost+probeTimeout)
}

// waitsFor is why the proxy is waited for; nil: it is not.
func (u *up) waitsFor() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.waiting
}

// mayCome reports whether err, of probe, may pass by itself: a proxy that can't be found or reached yet, or that does not answer.
func mayCome(err error) bool {
	var fault *proxyFault
	return errors.As(err, &fault) && !fault.lasting
}
