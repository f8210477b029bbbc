package incoming

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// hookTime is how long the command of --on-port may run. It is a variable for tests.
var hookTime = 10 * time.Second

// Hook runs a command whenever a port can be reached at another place. One command runs at a time; of several changes of
// one port that come meanwhile, only the last one is told.
type Hook struct {
	path string
	env  []string
	log  *slog.Logger

	mu    sync.Mutex
	news  map[Spec]outers
	order []Spec
	wake  chan struct{}
	ran   sync.WaitGroup
	stop  context.CancelFunc
}

// outers are the endpoints at which peers reach a port by IPv4 and IPv6; invalid: they do not.
type outers struct{ four, six netip.AddrPort }

// NewHook returns a Hook for the program path, which no shell sees: it gets no arguments, and env besides the variables
// about the port. The caller closes it.
func NewHook(path string, env []string, log *slog.Logger) *Hook {
	h := &Hook{path: path, env: env, log: log, news: map[Spec]outers{}, wake: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	h.stop = cancel
	h.ran.Go(func() { h.run(ctx) })
	return h
}

// Announce is for Config.Announce. It does not block.
func (h *Hook) Announce(s Spec, at, at6 netip.AddrPort) {
	h.mu.Lock()
	if _, ok := h.news[s]; !ok {
		h.order = append(h.order, s)
	}
	h.news[s] = outers{at, at6}
	h.mu.Unlock()
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// Close ends the command that runs, and waits for that.
func (h *Hook) Close() {
	h.stop()
	h.ran.Wait()
}

func (h *Hook) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		}
		for ctx.Err() == nil {
			h.mu.Lock()
			if len(h.order) == 0 {
				h.mu.Unlock()
				break
			}
			s := h.order[0]
			h.order = h.order[1:]
			at := h.news[s]
			delete(h.news, s)
			h.mu.Unlock()
			h.tell(ctx, s, at)
		}
	}
}

// outerEnv returns the variables about an outer endpoint, whose names end in suffix. There are none if it is invalid.
func outerEnv(at netip.AddrPort, suffix string) []string {
	if !at.IsValid() {
		return nil
	}
	return []string{
		"VIASOCKS_OUTER_ADDRESS" + suffix + "=" + at.Addr().String(),
		"VIASOCKS_OUTER_PORT" + suffix + "=" + strconv.Itoa(int(at.Port())),
	}
}

// tell runs the command for one change, in a process group of its own that ends with it.
func (h *Hook) tell(ctx context.Context, s Spec, at outers) {
	ctx, cancel := context.WithTimeout(ctx, hookTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.path)
	cmd.Env = append(h.env[:len(h.env):len(h.env)], "VIASOCKS_LISTEN_PORT="+strconv.Itoa(int(s.Port)),
		"VIASOCKS_LISTEN_PROTO="+s.Proto.String(),
		"VIASOCKS_LISTEN_UPSTREAM="+s.Upstream)
	cmd.Env = append(cmd.Env, outerEnv(at.four, "")...)
	cmd.Env = append(cmd.Env, outerEnv(at.six, "6")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err := cmd.Run()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what it has left in its group
	}
	if ctx.Err() != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("it took longer than %v", hookTime)
	} else if ctx.Err() != nil {
		return
	}
	if err != nil {
		h.log.Warn("the command of --on-port failed", "command", h.path, "port", s.Port, "err", err)
	}
}
