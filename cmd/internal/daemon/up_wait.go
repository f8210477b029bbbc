package daemon

import (
	"context"
	"errors"
	"sync"
	"time"
)

// The pauses of --wait between two checks of a proxy that is not reachable: they double from the first to the last.
// They start again at the first when the network or the configuration changes.
const (
	waitFirst = time.Second
	waitMost  = 30 * time.Second
)

// waiter checks repeatedly for a proxy that is not reachable yet, while the host is closed. Its methods belong to the
// goroutine of up.live.
type waiter struct {
	u     *up
	ctx   context.Context // for the probes
	ran   *sync.WaitGroup // counts the probes, which are waited for
	pause time.Duration
	again *time.Timer
	tried chan error // receives the result of the running probe
	busy  bool       // a probe is running
}

// newWaiter returns a waiter that waits from the start if the first check failed with u.waiting, and otherwise never
// does.
func (u *up) newWaiter(ctx context.Context, ran *sync.WaitGroup) *waiter {
	w := &waiter{u: u, ctx: ctx, ran: ran, pause: waitFirst, again: time.NewTimer(waitFirst), tried: make(chan error, 1)}
	if u.waitsFor() == nil {
		w.again.Stop()
	}
	return w
}

// try starts a check now. The result arrives on w.tried.
func (w *waiter) try() {
	if w.busy {
		return
	}
	w.again.Stop()
	w.busy = true
	cfg := w.u.config()
	w.ran.Go(func() { w.tried <- probe(w.ctx, cfg, w.u.dial) })
}

// changed checks at once, because the reason for waiting may have changed. It does nothing if there is no waiting.
func (w *waiter) changed() {
	if w.u.waitsFor() != nil {
		w.pause = waitFirst
		w.try()
	}
}

// found handles the result of a probe and reports whether the proxy is there.
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

// waitFor records that we wait for the proxy because of err: in the status, to systemd, and in the log if err has
// changed.
func (u *up) waitFor(err error) {
	u.mu.Lock()
	said := u.waiting != nil && u.waiting.Error() == err.Error()
	u.waiting = err
	u.mu.Unlock()
	if !said {
		u.log.Warn("waiting for the proxy; the host is closed until it can be reached", "err", err)
	}
	u.notify.Waiting("waits for the proxy, the host is closed: "+err.Error(), waitMost+probeTimeout)
}

// waitsFor returns why we wait for the proxy, or nil.
func (u *up) waitsFor() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.waiting
}

// mayCome reports whether err, from probe, may pass by itself: a proxy that cannot be found or reached yet, or that
// does not answer.
func mayCome(err error) bool {
	var fault *proxyFault
	return errors.As(err, &fault) && !fault.lasting
}
