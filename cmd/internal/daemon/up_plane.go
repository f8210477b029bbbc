package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/netns"
)

// A data plane that ends by itself, for example because the TUN was deleted, is built again, but only a limited
// number of times.
const (
	rebuildMost   = 5
	rebuildWithin = time.Minute
)

// startPlane makes the TUN, or takes the existing one, and starts a data plane over it.
func (u *up) startPlane(cfg *config.Config) error {
	// With fail-open, a TUN without a reader would swallow what should get out if the guardian was killed together
	// with us. Therefore it does not persist.
	dev, wanted, err := openTUN(cfg, u.env, !u.first.Host.FailOpen, u.tun.changed)
	if err != nil {
		return err
	}
	diag, err := netns.OpenDiag()
	if err != nil {
		dev.Close()
		return err
	}
	diag.SetInterface(wanted.Index)
	p, err := newPlane(cfg, dev, diagSockets{diag, &forwarding{dir: "/proc/sys/net"}}, u.dial, u.log)
	if err != nil {
		diag.Close()
		return err
	}
	p.start()
	u.use(p, diag, dev, wanted)
	return nil
}

// use makes p the data plane.
func (u *up) use(p *plane, diag *netns.Diag, dev tun.Device, wanted netns.Wanted) {
	u.diag = diag
	u.tun.use(dev, wanted)
	u.teller.Use(wanted.Index)
	u.mu.Lock()
	u.plane = p
	u.mu.Unlock()
}

// listen lets peers behind the proxies connect to programs of this host, if the configuration says so.
func (u *up) listen() { u.plane.listen(u.config(), u.Environ, u.inner) }

// inner returns the host's address to which the connection of a peer is opened. It is listening.inner.
func (u *up) inner(peer netip.Addr) (netip.Addr, error) {
	_, h := u.running()
	if h == nil {
		return netip.Addr{}, errors.New("the host is not steered")
	}
	return h.Inner(peer)
}

// stopPlane ends the data plane, if there is one. It calls between after the app's flows were reset.
func (u *up) stopPlane(between func()) {
	if u.plane == nil {
		if between != nil {
			between()
		}
		return
	}
	stop(u.plane, between)
	u.diag.Close()
}

// rebuild replaces a data plane that ended with the error why. The host stays steered and closed meanwhile.
func (u *up) rebuild(why error) error {
	now := time.Now()
	for len(u.rebuilt) > 0 && now.Sub(u.rebuilt[0]) > rebuildWithin {
		u.rebuilt = u.rebuilt[1:]
	}
	if len(u.rebuilt) == rebuildMost {
		return fmt.Errorf("%w (%d times within %v)", why, rebuildMost+1, rebuildWithin)
	}
	u.rebuilt = append(u.rebuilt, now)
	u.log.Warn("the data plane ended: starting it again", "err", why)
	u.stopPlane(nil)
	u.mu.Lock()
	cfg := u.cfg
	u.mu.Unlock()
	if err := u.startPlane(cfg); err != nil {
		return fmt.Errorf("%w; and then: %w", why, err)
	}
	if err := u.host.Steer(); err != nil {
		return fmt.Errorf("%w; and then: %w", why, err)
	}
	u.listen()
	u.log.Info("the data plane works again", "took", time.Since(now).Round(time.Millisecond))
	return nil
}

// leaveTUN leaves a TUN without a reader: without it, answers to connections from outside are refused before their
// mark can be restored.
func (u *up) leaveTUN(failed error) {
	if failed == nil && !u.first.Host.FailOpen {
		return // it exists
	}
	dev, _, err := openTUN(u.first, u.env, true, nil)
	if err == nil {
		dev.Close()
		err = u.host.Steer()
	}
	if err != nil {
		u.log.Error("answers to connections from outside may be lost", "err", err)
	}
}
