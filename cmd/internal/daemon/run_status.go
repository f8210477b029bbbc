package daemon

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/publish"
)

// instance is what status needs to know about a program under run.
type instance struct {
	pid       int // of the program
	tun       string
	published *publish.Publisher // nil: none
}

// serveRun answers `status` and `flows` for a program under `run` until end is called. If that is not possible, the
// program runs anyway.
func serveRun(cfg *config.Config, p *plane, at instance, o RunOptions, log *slog.Logger) (end func()) {
	since := time.Now()
	status := func() control.Status {
		s := control.Status{
			Version: o.Version, PID: os.Getpid(), Mode: control.ModeRun, Program: filepath.Base(cfg.Program[0]),
			Name: cfg.Name, Inside: at.pid,
			State: control.Ready, Since: since, ReadyAt: &since, Config: cfg.File, Warnings: cfg.Warnings,
			DNS: resolverWords(cfg),
		}
		fillPublished(&s, at.published)
		p.fill(&s, cfg, nil)
		p.fillListening(&s)
		return s
	}
	// the watcher has gone, or p has ended
	watch := func(ctx context.Context, send func([]control.Event) error) { _ = p.watch(ctx, send) }
	record := func(ctx context.Context, what control.Capture, w io.Writer) error {
		return p.capture(ctx, what, w, o.Version, at.tun)
	}
	srv, err := control.ListenRun(control.RuntimeOf(o.Environ), control.Options{
		Backend: control.Backend{
			Status: status, Flows: p.flows, Name: p.programs.name, Watch: watch, Capture: record,
			Health: func(ctx context.Context) control.Health { return p.healthNow(ctx, cfg, control.ModeRun, control.Ready) },
		},
		Log: log,
	})
	if err != nil {
		log.Warn("the program runs, but 'viasocks status', 'flows' and 'ps' will not know of it", "err", err)
		return func() {}
	}
	return func() { srv.Close() }
}
