package daemon

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// addressesFor is how long the host's addresses are not read again. The kernel lists all of them for each question, and
// containers may ask as often as they like.
const addressesFor = time.Second

// hostAddresses knows the addresses of the host. Its methods may be called from any goroutine.
type hostAddresses struct {
	read func() ([]net.Addr, error)

	mu   sync.Mutex
	at   time.Time // when they were read
	have map[netip.Addr]bool
}

// has reports whether the host has the address a. It may be wrong for addressesFor after a change.
func (h *hostAddresses) has(a netip.Addr, now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.have == nil || now.Sub(h.at) >= addressesFor {
		h.at, h.have = now, map[netip.Addr]bool{}
		all, _ := h.read() // without an answer nobody may ask
		for _, n := range all {
			if p, err := netip.ParsePrefix(n.String()); err == nil {
				h.have[p.Addr()] = true
			}
		}
	}
	return h.have[a]
}
