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

// Handler receives what the stack captures. Each shard has its own frame reader, which calls the handler with its
// number (0 to Shards-1). Calls for one shard are sequential; calls for different shards may run concurrently. All
// packets from one app port belong to one shard. No call may block.
type Handler interface {
	// HandleStream receives a new request. The handler owns it and must eventually call Accept or Reject.
	HandleStream(shard int, r flow.StreamRequest)
	// HandlePackets receives one burst of datagrams, up to the moment when the TUN is drained; data to be sent must
	// be flushed before it returns. The slices are valid only during the call.
	HandlePackets(shard int, pkts []flow.Packet)
}

// Config is the configuration for New.
type Config struct {
	Device  tun.Device
	Handler Handler
	Sockets flow.Sockets // queries the app's kernel for a socket; may be nil
	Log     *slog.Logger // nil: discarded
	Limits  Limits
	// KeepaliveIdle is how long a stream may be idle before keepalive probes the app's kernel. 0: DefaultKeepalive.
	KeepaliveIdle time.Duration
	// Shards is the maximum number of parts into which the flows are divided; a device that cannot be divided has
	// one. 0: the number of processors that the program uses. There are never more than 16.
	Shards int
}

// Limits are the budgets for SYNs that wait for an answer. Zero means the default.
type Limits struct {
	Pending        int // in total; default DefaultPending
	PendingPerDest int // for each destination address; default DefaultPendingPerDest
}

// DefaultKeepalive is the minimum of RFC 9293, section 3.8.4, unless the user wants otherwise: two hours.
const DefaultKeepalive = 2 * time.Hour

// withDefaults fills in the defaults. Both New and Set take their limits from it.
func (l Limits) withDefaults() Limits {
	return Limits{Pending: cmp.Or(l.Pending, DefaultPending), PendingPerDest: cmp.Or(l.PendingPerDest, DefaultPendingPerDest)}
}

// Stack is the userspace stack over one device. The shards do the work.
type Stack struct {
	dev       tun.Device // the whole device, to be closed
	handler   Handler
	ssdp      atomic.Bool // see SetSSDP
	echo      EchoHandler // nil: the Handler does not implement it
	log       *slog.Logger
	keepalive atomic.Int64 // ns
	shards    []*shard
	tap       tap
	elsewhere atomic.Pointer[Elsewhere]

	mu      sync.Mutex
	running bool
	closed  bool
	down    bool // torn down
}

// SetSSDP sets whether the handler gets the datagrams to flow.SSDP, which it must answer or drop. Otherwise they are
// dropped, as all multicast is. It may be called from any goroutine.
func (s *Stack) SetSSDP(on bool) { s.ssdp.Store(on) }

// New makes a stack and takes ownership of cfg.Device, even if it fails. Nothing is read before Run. The caller must
// call Close, whether or not it calls Run.
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
	s.echo, _ = cfg.Handler.(EchoHandler)
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

// Shards returns the number of parts into which the flows are divided. It never changes.
func (s *Stack) Shards() int { return len(s.shards) }

// Run reads the frames. It returns nil when ctx is done or Close is called, or an error when the device fails. When
// it returns, the app's streams have been reset, requests cancelled and goroutines ended. It may be called once.
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
		s.ResetAll() // while the device still accepts frames
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

// read runs the frame readers until the first one fails and all have ended.
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

// ResetAll refuses with RST every pending stream and, from now on, every new one, and sends RST to every open stream,
// whose listener sees flow.ErrReset. It may be called from any goroutine, but not from a call of a Listener.
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

// Close closes the device, which ends Run. If Run was not called, Close tears the stack down itself. It does not wait
// for Run, and may be called twice and from any goroutine.
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

// teardown ends what is left when no more frames are read: first the requests, so that no handshake begins, then the
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
		p.acks.close()
	}
}
