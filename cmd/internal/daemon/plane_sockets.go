package daemon

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/owner"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun/netns"
)

// diagSockets adapts a sock_diag socket for stack and route.
type diagSockets struct {
	*netns.Diag
	guests *forwarding // nil: nothing is forwarded
}

// Exists implements flow.Sockets.
func (d diagSockets) Exists(proto flow.Proto, src, dst netip.AddrPort) (bool, error) {
	ok, err := d.Diag.Exists(uint8(proto), src, dst)
	if !ok && err == nil && d.guests.on() {
		err = flow.ErrForwarded
	}
	return ok, err
}

// Forwards implements flow.Sockets.
func (d diagSockets) Forwards() bool { return d.guests.on() }

// ownersOf returns the source of owners for sockets, or nil if there is none.
func ownersOf(sockets flow.Sockets) flow.Owners {
	if d, ok := sockets.(diagSockets); ok {
		return owner.NewFinder(d.Diag)
	}
	return nil
}

// forwarding tells whether the host forwards packets. It reads the kernel's settings at intervals.
type forwarding struct {
	dir string // /proc/sys/net, except in tests

	mu      sync.Mutex
	checked time.Time
	forward bool
}

// forwardingAge is how long an answer is used.
const forwardingAge = 5 * time.Second

func (f *forwarding) on() bool {
	if f == nil {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); f.checked.IsZero() || now.Sub(f.checked) >= forwardingAge {
		f.checked, f.forward = now, forwards(f.dir)
	}
	return f.forward
}

// forwards reports whether a device forwards what it receives. A setting that cannot be read counts as forwarding.
func forwards(dir string) bool {
	for _, family := range []string{"ipv4", "ipv6"} {
		settings, err := filepath.Glob(filepath.Join(dir, family, "conf", "*", "forwarding"))
		if err != nil {
			return true
		}
		for _, name := range settings {
			if filepath.Base(filepath.Dir(name)) == "default" { // the default for new devices
				continue
			}
			b, err := os.ReadFile(name)
			if os.IsNotExist(err) { // the device is gone
				continue
			}
			if err != nil || !bytes.Equal(bytes.TrimSpace(b), []byte("0")) {
				return true
			}
		}
	}
	return false
}
