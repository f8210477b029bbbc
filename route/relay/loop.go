package relay

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
)

// Config is the configuration of a Loop.
type Config struct {
	// IdleTimeout is how long an upstream connection may be silent before keepalive probes begin. 0: DefaultIdle.
	IdleTimeout time.Duration
	Log         *slog.Logger // nil: slog.Default
}

// DefaultIdle is the minimum of RFC 1122, section 4.2.3.6, unless the user wants otherwise.
const DefaultIdle = 2 * time.Hour

// ErrClosed means that the loop or the link was closed.
var ErrClosed = loop.ErrClosed

// Loop is an event loop with what relays and links share: buffers that are used only during a turn. When its Run
// returns, every relay was reset on both sides, every link was closed, and every done and closed function was called.
type Loop struct {
	*loop.Loop
	log  *slog.Logger
	idle atomic.Int64 // TCP_KEEPIDLE in seconds; 0: the kernel's default is right

	noGSO atomic.Bool // links send without UDP_SEGMENT: see GSO

	// The fields below belong to the loop's goroutine.
	w    upWriter
	p    downPayload
	recv *recvBuffers
}

// Bits of Node.Got. Those of the loop are about the socket. The first two, and appIn and appOut, stay set until an
// attempt fails.
const (
	sockIn  = loop.In
	sockOut = loop.Out
	sockHup = loop.Hup
	sockErr = loop.Err
	ticked  = loop.Tick // the linger timer
)

// Bits of a relay or a link.
const (
	appIn    = loop.Own << iota // the app's stream may have data or FIN
	appOut                      // the app's stream may take data
	appHup                      // the app may have reset it: query the stream
	opened                      // Listener.Opened was called
	ended                       // the owner ends it
	orphaned                    // the app's socket no longer exists
	failed                      // a stream link could not send
)

// SetIdleTimeout changes Config.IdleTimeout for relays that start later. 0: DefaultIdle.
func (l *Loop) SetIdleTimeout(d time.Duration) { l.idle.Store(int64(keepIdle(d))) }

// NewLoop makes a loop. Relays may be started at once; they make progress while Run runs.
func NewLoop(c Config) (*Loop, error) {
	if c.IdleTimeout < 0 || c.IdleTimeout > 0 && c.IdleTimeout < time.Second {
		return nil, fmt.Errorf("cannot make a loop: idle timeout %v is less than a second", c.IdleTimeout)
	}
	l := &Loop{log: c.Log}
	l.SetIdleTimeout(c.IdleTimeout)
	if l.log == nil {
		l.log = slog.Default()
	}
	var err error
	if l.Loop, err = loop.New(); err != nil {
		return nil, err
	}
	l.w.buf = make([]byte, 0, gatherCap)
	return l, nil
}

// keepIdle returns TCP_KEEPIDLE for d, or 0 if that is the kernel's default anyway, which saves a system call for
// each flow.
func keepIdle(d time.Duration) int {
	if d == 0 {
		d = DefaultIdle
	}
	secs := min(int(d/time.Second), 32767) // MAX_TCP_KEEPIDLE
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_keepalive_time"); err == nil {
		if now, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && now == secs {
			return 0
		}
	}
	return secs
}
