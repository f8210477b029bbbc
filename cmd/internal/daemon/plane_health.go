package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route/kernel"
)

const (
	// healthTime limits the check of the upstreams. The whole answer may take control.HealthTime.
	healthTime = 1200 * time.Millisecond
	// healthFresh is the maximum age of an answer. No proxy is checked more often, even if many clients ask.
	healthFresh = time.Second
	// aliveTime limits the wait for an answer of the data plane.
	aliveTime = 300 * time.Millisecond
	askDoctor = "'viasocks doctor' says more"
)

// healthChecks stores the result of the last check of the upstreams.
type healthChecks struct {
	mu   sync.Mutex
	at   time.Time
	last []control.UpstreamHealth
}

// healthNow tells whether traffic passes through `up`.
func (u *up) healthNow(ctx context.Context) control.Health {
	p, h := u.running()
	s := u.status()
	out := control.Health{Mode: control.ModeUp, PID: os.Getpid(), State: s.State}
	switch {
	case s.State == control.Waiting:
		out.Reason, out.Do = "the host is closed until the proxy can be reached: "+s.Waiting, askDoctor
		return out
	case s.State == control.Impaired && len(s.Warnings) > 0:
		out.Reason, out.Do = s.Warnings[0], "see 'viasocks status'"
		return out
	case s.State != control.Ready && s.State != control.Unconfirmed || p == nil || h == nil:
		out.Reason, out.Do = "viasocks is "+s.State, "wait, or see 'viasocks status'"
		return out
	}
	if err := kernel.Steered(s.Host.TUN, s.Host.Table); err != nil {
		out.Reason, out.Do = err.Error(), "viasocks puts it back by itself; see its log"
		return out
	}
	return p.healthNow(ctx, u.config(), control.ModeUp, s.State)
}

// healthNow tells whether the data plane responds and whether an upstream works.
func (p *plane) healthNow(ctx context.Context, cfg *config.Config, mode, state string) control.Health {
	out := control.Health{Mode: mode, PID: os.Getpid(), State: state}
	alive := make(chan struct{})
	go func() { // it may hang; this is what the check finds out
		p.router.Stats()
		close(alive)
	}()
	select {
	case <-alive:
	case <-time.After(aliveTime):
		out.Reason, out.Do = "the data plane does not answer", "restart viasocks, and report its log"
		return out
	}
	out.Upstreams = p.checkUpstreams(ctx)
	out.Healthy, out.Reason = judge(cfg.Default, out.Upstreams)
	if !out.Healthy {
		out.Do = askDoctor
	}
	return out
}

// judge tells whether traffic can pass: through the default upstream or, if there is none, through any upstream.
func judge(byDefault string, all []control.UpstreamHealth) (healthy bool, reason string) {
	for _, u := range all {
		switch {
		case u.Works && (byDefault == "" || u.Name == byDefault):
			return true, ""
		case !u.Works && (reason == "" || u.Name == byDefault):
			reason = u.Why
		}
	}
	return len(all) == 0, reason
}

// checkUpstreams connects to all upstreams concurrently and logs in.
func (p *plane) checkUpstreams(ctx context.Context) []control.UpstreamHealth {
	h := &p.health
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.last != nil && time.Since(h.at) < healthFresh {
		return h.last
	}
	ctx, cancel := context.WithTimeout(ctx, healthTime)
	defer cancel()
	p.mu.Lock()
	ups := p.ups
	p.mu.Unlock()
	all := []control.UpstreamHealth{}
	var ends []chan error
	for _, u := range ups {
		if u.client == nil {
			continue // direct
		}
		end := make(chan error, 1)
		u.client.Check(ctx, p.loops[0].Loop, func(errs []error) {
			if len(errs) > 0 {
				end <- explain(u.Config.Server, errs[0])
				return
			}
			end <- nil
		})
		ends = append(ends, end)
		all = append(all, control.UpstreamHealth{Name: u.Config.Name, URL: u.Config.Server.String()})
	}
	for i, end := range ends {
		err := errors.New("the data plane does not answer")
		select {
		case err = <-end:
		case <-time.After(healthTime + aliveTime):
		}
		if all[i].Works = err == nil; err != nil {
			all[i].Why = fmt.Sprint(err)
		} else {
			p.dial.absent.works(all[i].Name)
		}
	}
	h.at, h.last = time.Now(), all
	return all
}
