package stack

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// engine is a gVisor stack with everything that belongs to it alone. A shard has one at a time, and Renew replaces
// it.
type engine struct {
	ns      *gstack.Stack
	link    *link
	listen4 *listener
	listen6 *listener
	strays  sync.WaitGroup // goroutines that end connections which have no owner
	peak    atomic.Int64   // the most streams at any time
	past    tally          // totals of the engines before it
}

// tally counts the frames that gVisor itself found to be wrong, and the segments that it sent again.
type tally struct{ malformed, checksum, retransmits uint64 }

func (s *shard) newEngine() (*engine, error) {
	e := &engine{link: newLink(s)}
	var err error
	if e.ns, err = newNetstack(e.link); err != nil {
		return nil, err
	}
	if e.listen4, err = s.listen(e, header.IPv4ProtocolNumber); err == nil {
		e.listen6, err = s.listen(e, header.IPv6ProtocolNumber)
	}
	if err != nil {
		e.destroy()
		return nil, err
	}
	e.ns.SetTransportProtocolHandler(tcp.ProtocolNumber, s.handleTCP)
	e.ns.SetTransportProtocolHandler(udp.ProtocolNumber, s.handleSlowUDP)
	return e, nil
}

// destroy ends gVisor's stack with its goroutines and remaining streams.
func (e *engine) destroy() {
	for _, l := range []*listener{e.listen4, e.listen6} {
		if l != nil {
			l.close()
		}
	}
	e.ns.Destroy()
	e.strays.Wait()
}

func (e *engine) tally() tally {
	gv := e.ns.Stats()
	return tally{
		e.past.malformed + gv.IP.MalformedPacketsReceived.Value() + gv.TCP.InvalidSegmentsReceived.Value(),
		e.past.checksum + gv.TCP.ChecksumErrors.Value(),
		e.past.retransmits + gv.TCP.Retransmits.Value(),
	}
}

// empty reports whether no endpoint is left, including those that were closed and still wait for the app's last ACK.
func (e *engine) empty() bool {
	return len(e.ns.RegisteredEndpoints()) == 0 && len(e.ns.CleanupEndpoints()) == 0
}

// opened records that there are now n streams.
func (e *engine) opened(n int64) {
	for p := e.peak.Load(); n > p && !e.peak.CompareAndSwap(p, n); p = e.peak.Load() {
	}
}

// Renew replaces those of gVisor's stacks that had many streams at once and have none now, and reports whether it
// replaced any. gVisor's table of endpoints never shrinks, and takes 1.3 MB after 9,500 streams. SYNs that wait for
// their answer are not affected. Renew may be called from any goroutine, but not from a call of a Handler or a
// Listener.
func (s *Stack) Renew() bool {
	renewed := false
	for _, p := range s.shards {
		renewed = p.renew() || renewed
	}
	return renewed
}

func (s *shard) renew() bool {
	old := s.engine.Load()
	if old.peak.Load() <= int64(remake/len(s.shards)) || s.stats.streams.Load() != 0 || !old.empty() {
		return false
	}
	next, err := s.newEngine()
	if err != nil {
		return false // nothing would be gained
	}
	if !s.replace(old, next) {
		next.destroy()
		return false
	}
	old.destroy()
	return true
}

// replace puts next in the place of old, unless old has come into use again or the stack is about to end.
func (s *shard) replace(old, next *engine) bool {
	s.mu.Lock() // teardown finds either old or next
	defer s.mu.Unlock()
	s.feeding.Lock() // no frame is on its way into old
	defer s.feeding.Unlock()
	s.pending.mu.Lock() // no handshake begins
	defer s.pending.mu.Unlock()
	if s.closed || s.engine.Load() != old || s.pending.shakes != 0 || len(s.pending.knocks) != 0 || s.stats.streams.Load() != 0 ||
		!old.empty() {
		return false
	}
	next.past = old.tally()
	s.engine.Store(next)
	return true
}
