package route

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// upstream is an Upstream and what is known about it.
type upstream struct {
	Upstream
	name     string
	own      bool // belongs to the Router itself, whatever the policy
	apart    bool // separates programs: the owner of a flow is looked up before the dial
	tcp, udp health
	dials    dialStats // TCP
	ipv6     ipv6Known
	count    *upstreamCounters
	names    takings // what its servers do with names in the headers of datagrams

	// The server reported that it does not carry UDP: until then (on the Router's clock) it is not asked again, and
	// datagrams are refused with refuseWhy.
	refuseUntil atomic.Int64
	refuseWhy   atomic.Uint32

	heard atomic.Bool  // an answer came by UDP since the last failure
	deaf  atomic.Int32 // consecutive associations that the server ended without an answer
	// unreachable is the number of ICMP errors that datagrams met since the last answer, if there was any.
	unreachable atomic.Uint64
}

// noUDP is how long "no UDP" is remembered. The next datagram after that is a new try.
const noUDP = time.Minute

// refused reports whether datagrams for u are refused at the time now, and how.
func (u *upstream) refused(now int64) (flow.Refusal, bool) {
	if until := u.refuseUntil.Load(); until == 0 || now >= until {
		return 0, false
	}
	return flow.Refusal(u.refuseWhy.Load()), true
}

// health records whether the server works, so that a failure is logged once and not for each flow.
type health struct {
	mu      sync.Mutex
	down    atomic.Bool // written under mu; read by each flow
	logged  bool        // that it is down was logged
	changed time.Time
}

// quiet is the minimum time between two log lines about one upstream, so that a server that fails now and then does
// not fill the log.
const quiet = 10 * time.Second

func (h *health) failed(r *Router, u *upstream, what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.down.Load() && h.logged {
		return
	}
	h.down.Store(true)
	if now := time.Now(); h.changed.IsZero() || now.Sub(h.changed) >= quiet {
		h.changed, h.logged = now, true
		r.log.post(slog.LevelWarn, "upstream does not work for "+what, slog.String("upstream", u.name), slog.Any("err", err))
	}
}

func (h *health) works(r *Router, u *upstream, what string) {
	if !h.down.Load() {
		return // no lock for each flow
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.down.Load() {
		return
	}
	h.down.Store(false)
	if h.logged {
		h.logged = false
		h.changed = time.Now()
		r.log.post(slog.LevelInfo, "upstream works again for "+what, slog.String("upstream", u.name))
	}
}

// isDown returns the state for the status.
func (h *health) isDown() bool { return h.down.Load() }
