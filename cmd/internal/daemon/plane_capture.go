package daemon

import (
	"context"
	"errors"
	"io"
	"sync/atomic"

	"github.com/viasocks/viasocks/cmd/internal/capture"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/tun"
)

// errCapturing means that another capture is running. There is one at a time, so that captures need the memory of only
// one queue.
var errCapturing = errors.New("another capture is under way")

// capturing is true while a capture is running.
type capturing struct{ atomic.Bool }

// capture writes what crosses the TUN to w, until a limit of f is reached, ctx ends or w fails. The data plane does not
// wait for w.
func (p *plane) capture(ctx context.Context, f control.Capture, w io.Writer, version, device string) error {
	if !p.capturing.CompareAndSwap(false, true) {
		return errCapturing
	}
	defer p.capturing.Store(false)
	s, err := capture.New(capture.Filter(f))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		// The data plane may end first: then no more packets come.
		defer cancel()
		_ = p.watch(ctx, func(events []control.Event) error { s.Know(events); return nil })
	}()
	defer func() { cancel(); <-watched }()
	now := p.flows()
	p.programs.name(now)
	events := make([]control.Event, len(now))
	for i := range now {
		events[i].Flow = &now[i]
	}
	s.Know(events)
	p.stack.SetTap(func(_ *tun.Header, parts [][]byte, toApp bool) { s.Saw(parts, toApp) })
	defer p.stack.SetTap(nil)
	return s.Run(ctx, w, "viasocks "+version, device)
}
