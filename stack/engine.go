package stack

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// engine is gVisor's stack, and what belongs to it alone. A shard has one at a time, and Renew replaces it.
type engine struct {
	ns      *gstack.Stack
	link    *link
	listen4 *listener
	listen6 *listener
	strays  sync.WaitGroup // what ends connections that nobody waits for
	peak    atomic.Int64   // streams at once
	past    verdicts       // of the engines before it
}

// verdicts is what gVisor verified and refused itself, and sent again.
type verdicts struct{ malformed, checksum, retransmits uint64 }

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

// destroy ends gVisor's stack and its goroutines, and what streams are left.
func (e *engine) destroy() {
	for _, l := range []*listener{e.listen4, e.listen6} {
		if l != nil {
			l.close()
		}
	}
	e.ns.Destroy()
	e.strays.Wait()
}

func (e *engine) verdicts() verdicts {
	gv := e.ns.Stats()
	return verdicts{
		e.past.malformed + gv.IP.MalformedPacketsReceived.Value() + gv.TCP.InvalidSegmentsReceived.Value(),
		e.past.checksum + gv.TCP.ChecksumErrors.Value(),
		e.past.retransmits + gv.TCP.Retransmits.Value(),
	}
}

// empty reports whether no endpoint is left, also none that we closed and that still waits for the app's last ACK.
func (e *engine) empty() bool {
	return len(e.ns.RegisteredEndpoints()) == 0 && len(e.ns.CleanupEndpoints()) == 0
}

// opened notes that there are n streams now.
func (e *engine) opened(n int64) {
	for p := e.peak.Load(); n > p && !e.peak.CompareAndSwap(p, n); p = e.peak.Load() {
	}
}

// Renew replaces each of gVisor's stacks that had many streams at once and has none now, and reports whether it replaced any:
// gVisor's table of endpoints never shrinks, and is 1.3 MB after 9,500. SYNs that wait for their answer are not touched. Any
// goroutine, but not from a Handler's or a Listener's call.
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
		return false // the old one is as good
	}
	if !s.replace(old, next) {
		next.destroy()
		return false
	}
	old.destroy()
	return true
}

// replace puts next in the place of old, unless old came into use again, or all is about to end.
func (s *shard) replace(old, next *engine) bool {
	s.mu.Lock() // teardown finds the one or the other
	defer s.mu.Unlock()
	s.feeding.Lock() // no frame is on its way into old
	defer s.feeding.Unlock()
	s.pending.mu.Lock() // no handshake begins
	defer s.pending.mu.Unlock()
	if s.closed || s.engine.Load() != old || s.pending.shakes != 0 || s.stats.streams.Load() != 0 || !old.empty() {
		return false
	}
	next.past = old.verdicts()
	s.engine.Store(next)
	return true
}
