package route

import (
	"errors"
	"log/slog"
	"sync"
	"syscall"
	"time"
)

// shortage records that this host has run out of something that flows need: descriptors, local ports, memory, or the
// room that the limits leave. That says nothing about the far end or the proxy, so the app gets no error that blames
// them. It gets silence, as from a network that loses a packet, and tries again.
type shortage struct {
	mu   sync.Mutex
	n    uint64
	why  error
	last time.Time
	said time.Time
}

// shortageQuiet is the minimum time between two log lines about a shortage.
const shortageQuiet = time.Minute

// isShortage reports whether err means that this host has run out of something.
func isShortage(err error) bool {
	if isServerFault(err) {
		return false
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return errors.Is(err, errFull) || errors.Is(err, errMappingsFull)
	}
	switch errno {
	case syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM, syscall.EAGAIN:
		return true // from a connect(2) on our sockets, EADDRNOTAVAIL and EAGAIN mean that no local port is left
	}
	return false
}

// short records a shortage. It may be called from any goroutine, with locks held.
func (b *base) short(err error) {
	s := &b.shortage
	now := time.Now()
	s.mu.Lock()
	s.n++
	s.why, s.last = err, now
	say := s.said.IsZero() || now.Sub(s.said) >= shortageQuiet
	if say {
		s.said = now
	}
	n := s.n
	s.mu.Unlock()
	if say {
		b.log.post(slog.LevelWarn, "this host has run out of what new flows need: programs have to wait and try again",
			slog.Any("err", err), slog.Uint64("times", n))
	}
}

// Shortage tells how often, and when, this host ran out of descriptors, local ports, memory or room for flows.
type Shortage struct {
	Times uint64    // since the start
	Last  time.Time // the zero time: never
	Why   string
}

// Shortage returns what is known about shortages.
func (b *base) Shortage() Shortage {
	s := &b.shortage
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n == 0 {
		return Shortage{}
	}
	return Shortage{Times: s.n, Last: s.last, Why: s.why.Error()}
}
