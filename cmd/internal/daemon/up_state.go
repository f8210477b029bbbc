package daemon

import (
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// The states of up are starting, then waiting if the proxy is not reachable yet, unconfirmed if a confirmation is
// required, and ready.

// awaitConfirm starts the time within which a confirmation is required, if one is.
func (u *up) awaitConfirm() (over <-chan time.Time, end func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	end = func() {}
	if d := u.first.Host.Confirm; d > 0 && !u.before.startedUs() { // the process that started us was confirmed
		by := time.Now().Add(d)
		u.confirmBy = &by
		t := time.NewTimer(d)
		over, end = t.C, func() { t.Stop() }
		u.log.Warn("all changes are undone unless you run 'viasocks confirm'", "within", d)
	}
	u.state = u.stateNow()
	return over, end
}

// settle records that no confirmation is required any more.
func (u *up) settle() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.confirmBy = nil
	u.state = u.stateNow()
}

// ready reports that captured traffic is carried.
func (u *up) ready() {
	cfg, now := u.config(), time.Now()
	u.checkNames(cfg)
	u.mu.Lock()
	u.readyAt, u.state = &now, u.stateNow()
	u.mu.Unlock()
	u.log.Info("ready", "tun", cfg.TUN, "proxy", proxyName(cfg))
	u.notify.Ready("carries the host through " + proxyName(cfg))
}

// stateNow returns one of control's states while it is up. The caller holds u.mu.
func (u *up) stateNow() string {
	switch {
	case u.waiting != nil:
		return control.Waiting
	case u.confirmBy != nil:
		return control.Unconfirmed
	}
	return control.Ready
}
