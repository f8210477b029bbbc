package stack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
)

// Handler takes what the stack captured. Each shard has a frame reader of its own, which calls the handler and says which shard
// it is (0 to Shards-1): calls for one shard come one after another, calls for different shards come at the same time. All that
// one app's port sends comes to one shard. No call may block.
type Handler interface {
	// HandleStream takes a new request. The handler owns it: it must call Accept or Reject sooner or later.
	HandleStream(shard int, r flow.StreamRequest)
	// HandlePackets takes one burst of datagrams, until the TUN is drained: return means flush. The slices are lent.
	HandlePackets(shard int, pkts []flow.Packet)
}

// Config is what New needs.
type Config struct {
	Device  tun.Device
	Handler Handler
	Sockets flow.Sockets // asks the app's kernel whether a socket is still there; may be nil
	Log     *slog.Logger // nil: discarded
	Limits  Limits
	// KeepaliveIdle is how long a stream may be idle before the app's kernel is asked whether it is still there.
	// 0: DefaultKeepalive.
	KeepaliveIdle time.Duration
	// Shards is how many parts the flows are divided into at the most: a device that cannot be divided has one. 0: as many as
	// the program runs on processors. There are never more than 16.
	Shards int
}

// Limits are the budgets for SYNs that wait for an answer. Zero means the default.
type Limits struct {
	Pending        int // in all; default DefaultPending
	PendingPerDest int // for each destination address; default DefaultPendingPerDest
}

// DefaultKeepalive is that of RFC 9293 3.8.4: two hours at the least unless the user wants otherwise.
const DefaultKeepalive = 2 * time.Hour

// withDefaults fills in the defaults. New and Set both take their limits from it.
func (l Limits) withDefaults() Limits {
	return Limits{Pending: cmp.Or(l.Pending, DefaultPending), PendingPerDest: cmp.Or(l.PendingPerDest, DefaultPendingPerDest)}
}

// Stack is the userspace stack over one device. The work is the shards'.
type Stack struct {
	dev       tun.Device // all of it, to be closed
	handler   Handler
	log       *slog.Logger
	keepalive atomic.Int64 // ns
	shards    []*shard

	mu      sync.Mutex
	running bool
	closed  bool
	down    bool // torn down
}

// New makes a stack and takes ownership of cfg.Device, also when it fails. Nothing is read before Run; Close gives
// everything back, whether Run was called or not.
func New(cfg Config) (*Stack, error) {
	if cfg.Device == nil {
		return nil, errors.New("cannot make a stack: no device")
	}
	s, err := newStack(cfg)
	if err != nil {
		cfg.Device.Close()
	}
	return s, err
}

func newStack(cfg Config) (*Stack, error) {
	switch {
	case cfg.Handler == nil:
		return nil, errors.New("cannot make a stack: no handler")
	case cfg.Limits.Pending < 0 || cfg.Limits.PendingPerDest < 0:
		return nil, errors.New("cannot make a stack: a budget for pending dials is negative")
	case cfg.KeepaliveIdle < 0:
		return nil, errors.New("cannot make a stack: the keepalive time is negative")
	case cfg.Shards < 0:
		return nil, errors.New("cannot make a stack: the number of shards is negative")
	}
	s := &Stack{dev: cfg.Device, handler: cfg.Handler, log: cfg.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.keepalive.Store(int64(cmp.Or(cfg.KeepaliveIdle, DefaultKeepalive)))
	n := cmp.Or(cfg.Shards, runtime.GOMAXPROCS(0))
	parts, err := tun.Divide(s.dev, min(n, maxShards))
	if err != nil {
		return nil, err
	}
	b := newBudget()
	for _, p := range parts {
		e, err := newShard(s, p, b, cfg)
		if err != nil {
			for _, p := range s.shards {
				p.engine.Load().destroy()
			}
			return nil, err
		}
		s.shards = append(s.shards, e)
	}
	return s, nil
}

// Shards is into how many parts the flows are divided. It does not change.
func (s *Stack) Shards() int { return len(s.shards) }

// Run reads the frames. It blocks until ctx is done or Close is called (then it returns nil), or until the device
// fails. Either way the app's streams have been reset, requests cancelled and goroutines ended when it returns. It may
// be called once.
func (s *Stack) Run(ctx context.Context) error {
	s.mu.Lock()
	if s.running || s.closed {
		s.mu.Unlock()
		return errors.New("cannot run the stack: it already ran or is closed")
	}
	s.running = true
	s.mu.Unlock()

	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.ResetAll() // while the device still takes it
		s.Close()
	})
	err := s.read()
	if !stop() {
		<-stopped
	}
	s.mu.Lock()
	asked := s.closed
	s.closed = true
	s.mu.Unlock()
	s.dev.Close()
	s.teardown()
	if asked {
		return nil
	}
	return fmt.Errorf("cannot read frames: %w", err)
}

// read runs the frame readers, until the first one fails and all have ended.
func (s *Stack) read() error {
	var wg sync.WaitGroup
	errs := make([]error, len(s.shards))
	var first atomic.Pointer[error]
	for i, p := range s.shards {
		wg.Go(func() {
			errs[i] = newFrameReader(p).run()
			if first.CompareAndSwap(nil, &errs[i]) {
				for _, p := range s.shards {
					p.dev.Close()
				}
			}
		})
	}
	wg.Wait()
	return *first.Load()
}

// ResetAll refuses every pending stream and, from here on, every new one with RST, and sends RST to every open one:
// their listeners see flow.ErrReset. Any goroutine; not from a Listener's call.
func (s *Stack) ResetAll() {
	for _, p := range s.shards {
		p.pending.refuseAll()
	}
	for _, p := range s.shards {
		p.pending.failAll()
		for _, ep := range p.engine.Load().ns.RegisteredEndpoints() {
			ep.Abort()
		}
	}
}

// Close closes the device, which ends Run. Without Run it tears the stack down itself. It may be called twice, from any
// goroutine, and does not wait for Run.
func (s *Stack) Close() error {
	s.mu.Lock()
	running := s.running
	s.closed = true
	s.mu.Unlock()
	err := s.dev.Close()
	if !running {
		s.teardown()
	}
	return err
}

// teardown ends what is left, when no frame is read any more: requests first, so that no handshake begins, then
// handshakes, then gVisor with its streams and goroutines.
func (s *Stack) teardown() {
	s.mu.Lock()
	down := s.down
	s.down = true
	s.mu.Unlock()
	if down {
		return
	}
	for _, p := range s.shards {
		p.pending.close()
		p.pending.failAll()
		p.engine.Load().destroy()
		p.pending.shaking.Wait()
	}
}
