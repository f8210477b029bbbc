package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun/netns"
)

// backend is the daemon for the control socket. It answers from the start on, and leaves out what does not exist yet.
func (u *up) backend() control.Backend {
	return control.Backend{
		Status: u.status, Flows: u.flows, Name: u.name, Watch: u.watch, Capture: u.capture, Health: u.healthNow,
		Confirm: u.confirmed,
		Exclude: u.choose(kernel.ExcludeProgram), Include: u.choose(kernel.IncludeProgram),
		Down: func() { u.stop(errDown) }, TakeOver: u.offerHost, Upgrade: u.upgrade,
	}
}

// capture writes what crosses the TUN to w. It ends when the data plane does.
func (u *up) capture(ctx context.Context, what control.Capture, w io.Writer) error {
	p, _ := u.running()
	if p == nil {
		return errors.New("nothing is carried yet")
	}
	return p.capture(ctx, what, w, u.Version, u.first.TUN)
}

func (u *up) confirmed() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.confirmBy == nil {
		return errors.New("there is nothing to confirm: it is " + u.state)
	}
	select {
	case u.confirm <- struct{}{}:
	default: // it was already confirmed
	}
	return nil
}

// running returns the parts that exist by now.
func (u *up) running() (*plane, *host) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.plane, u.host
}

func (u *up) status() control.Status {
	p, h := u.running()
	u.mu.Lock()
	cfg := u.cfg
	s := control.Status{
		Version: u.Version, PID: os.Getpid(), Mode: control.ModeUp, State: u.state, Since: u.since, ReadyAt: u.readyAt,
		ConfirmBy: u.confirmBy,
		Config:    cfg.File, Reloaded: u.reloaded,
		Warnings: slices.Concat(cfg.Warnings, u.warnings),
		Host:     control.Host{TUN: u.first.TUN, Table: u.first.Table, Mark: fmt.Sprintf("%#x/%#x", u.first.Mark, u.first.Mask)},
	}
	s.Before = u.theirs
	if u.waiting != nil {
		s.Waiting = u.waiting.Error()
	}
	u.mu.Unlock()
	if fault := u.tun.fault(); fault != "" {
		s.Warnings = append([]string{fault}, s.Warnings...)
		if s.State == control.Ready {
			s.State = control.Impaired
		}
	}
	s.Host.Resolved = u.teller.Told()
	s.DNS = resolverWords(cfg)
	if p == nil {
		return s
	}
	p.fill(&s, cfg, u.allowed)
	p.fillListening(&s)
	if h != nil {
		h.fill(&s, cfg)
	}
	return s
}

func (u *up) name(flows []control.Flow) {
	if p, _ := u.running(); p != nil {
		p.programs.name(flows)
	}
}

// watch watches the data plane, and the one that is made in place of it when it fails.
func (u *up) watch(ctx context.Context, send func([]control.Event) error) {
	var last *plane
	again := time.NewTicker(watchAgain)
	defer again.Stop()
	for {
		if p, _ := u.running(); p != nil && p != last {
			if last = p; p.watch(ctx, send) != nil {
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
	}
}

// watchAgain is how often a watcher looks whether there is a data plane.
const watchAgain = 100 * time.Millisecond

func (u *up) flows() []control.Flow {
	p, _ := u.running()
	if p == nil {
		return nil
	}
	return p.flows()
}

// serveMetrics answers Prometheus until end is called. control is the path of the control socket.
func (u *up) serveMetrics(control string) (end func(), err error) {
	if _, err := forgetMetrics(control); err != nil {
		return nil, fmt.Errorf("cannot remove the metrics socket of a dead viasocks: %w", err)
	}
	forget, err := recordMetrics(control, u.first.Metrics)
	if err != nil {
		return nil, err
	}
	endServing, err := serveMetrics(u.first, watched{
		plane:   func() *plane { p, _ := u.running(); return p },
		ready:   u.isReady,
		dropped: func() (uint64, error) { return netns.TXDropped(0, u.first.TUN) },
	}, u.Version, u.log)
	if err != nil {
		forget()
		return nil, err
	}
	return func() { endServing(); forget() }, nil
}

// isReady reports whether traffic is carried.
func (u *up) isReady() bool {
	if u.tun.fault() != "" {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state == control.Ready || u.state == control.Unconfirmed
}
