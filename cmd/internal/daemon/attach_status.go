package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/keeper"
	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/tun/netns"
)

// serve answers at the control socket at path, where `down` looks for it, and at another one in the user's directory, where
// `ps` and the others do. It announces that the namespace is carried, and serves metrics. end stops all of it.
func (a *attached) serve(path string) (end func(), err error) {
	var ends []func()
	endAll := func() {
		for _, f := range slices.Backward(ends) {
			f()
		}
	}
	defer func() {
		if err != nil {
			endAll()
		}
	}()
	b := a.backend()
	srv, err := control.Listen(control.Options{Path: path, Group: -1, Backend: b, Log: a.log})
	if err != nil {
		return nil, err
	}
	ends = append(ends, func() { srv.Close() })
	listed, err := control.ListenRun(control.RuntimeOf(a.Environ), control.Options{Backend: b, Log: a.log})
	if err != nil {
		a.log.Warn("the namespace is carried, but 'viasocks status', 'flows' and 'ps' will not know of it", "err", err)
	} else {
		ends = append(ends, func() { listed.Close() })
	}
	endMetrics, err := serveMetrics(a.cfg, watched{
		plane: a.running, ready: func() bool { return a.status().State == control.Ready },
		dropped: func() (uint64, error) { return netns.TXDropped(a.keeper.PID(), a.tunName()) },
	}, a.Version, a.log)
	if err != nil {
		return nil, err
	}
	ends = append(ends, endMetrics)
	unannounce, err := process.Announce(a.cfg.PIDFile, a.cfg.ReadyFD)
	if err != nil {
		return nil, err
	}
	ends = append(ends, unannounce)
	return endAll, nil
}

// backend is the daemon for the control sockets.
func (a *attached) backend() control.Backend {
	return control.Backend{
		Status: a.status,
		Flows:  func() []control.Flow { return a.running().flows() },
		Name:   func(f []control.Flow) { a.running().programs.name(f) },
		Watch: func(ctx context.Context, send func([]control.Event) error) {
			_ = a.running().watch(ctx, send) // the watcher has gone, or the data plane has ended
		},
		Capture: func(ctx context.Context, what control.Capture, w io.Writer) error {
			return a.running().capture(ctx, what, w, a.Version, a.tunName())
		},
		Health: a.healthNow,
		Down:   func() { a.stop(errDown) },
	}
}

func (a *attached) healthNow(ctx context.Context) control.Health {
	s := a.status()
	if s.State != control.Ready {
		h := control.Health{
			Mode: control.ModeAttach, PID: s.PID, State: s.State, Reason: "viasocks is " + s.State, Do: "see 'viasocks status'",
		}
		if s.State == control.Impaired {
			h.Reason = s.Warnings[0]
		}
		return h
	}
	return a.running().healthNow(ctx, a.cfg, control.ModeAttach, s.State)
}

func (a *attached) status() control.Status {
	seen, err := a.keeper.Look()
	a.mu.Lock()
	cfg := a.cfg
	s := control.Status{
		Version: a.Version, PID: os.Getpid(), Mode: control.ModeAttach, Program: a.target.Words, Name: cfg.Name,
		Inside: a.keeper.PID(), State: a.state, Since: a.since, ReadyAt: a.readyAt, Config: cfg.File,
		Warnings: slices.Clone(cfg.Warnings), DNS: resolverWords(cfg),
		Host: control.Host{TUN: a.tun.Name, Table: cfg.Table, Mark: fmt.Sprintf("%#x/%#x", cfg.Mark, cfg.Mask)},
	}
	p := a.plane
	fault := cmp.Or(a.broken, seen.Fault)
	a.mu.Unlock()
	switch {
	case errors.Is(err, keeper.ErrGone):
		fault = err.Error()
	case err != nil:
		s.Warnings = append(s.Warnings, err.Error())
	}
	if fault != "" {
		s.Warnings = append([]string{fault}, s.Warnings...)
		if s.State == control.Ready {
			s.State = control.Impaired
		}
	}
	p.fill(&s, cfg, nil)
	fillChoices(&s, cfg)
	for _, n := range seen.Private {
		s.Host.Excluded = append(s.Host.Excluded, "private network "+n)
	}
	s.Warnings = append(s.Warnings, seen.Warnings...)
	for _, r := range seen.Refused {
		s.Host.Refused = append(s.Host.Refused,
			control.Counter{Name: r.Reason, What: cmp.Or(reasons[r.Reason], r.Reason), Packets: r.Packets, Bytes: r.Bytes})
	}
	return s
}
