package stack

import (
	"encoding/binary"
	"errors"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Key identifies what one process carries of the app's traffic: a TCP connection by its endpoints, or a UDP socket by
// Src alone, whose Dst is then zero.
type Key struct {
	Proto    flow.Proto
	Src, Dst netip.AddrPort
}

// TCPKeys returns the keys of all TCP flows of the stack: those that are pending, open or closing. It may be called
// from any goroutine.
func (s *Stack) TCPKeys() (keys []Key) {
	for _, p := range s.shards {
		keys = p.pending.keys(keys)
		ns := p.engine.Load().ns
		for _, eps := range [][]gstack.TransportEndpoint{ns.RegisteredEndpoints(), ns.CleanupEndpoints()} {
			for _, ep := range eps {
				e, ok := ep.(tcpip.Endpoint)
				if !ok {
					continue
				}
				info, ok := e.Info().(*gstack.TransportEndpointInfo)
				if !ok || info.ID.RemotePort == 0 { // a listener
					continue
				}
				keys = append(keys, Key{
					Proto: flow.TCP,
					Src:   netip.AddrPortFrom(addrFrom(info.ID.RemoteAddress), info.ID.RemotePort),
					Dst:   netip.AddrPortFrom(addrFrom(info.ID.LocalAddress), info.ID.LocalPort),
				})
			}
		}
	}
	return keys
}

func (t *pendingTable) keys(keys []Key) []Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k := range t.byKey {
		keys = append(keys, Key{flow.TCP, k.src, k.dst})
	}
	return keys
}

// Files returns copies of the device's queues for another process, which makes its own device of them (tun.Adopt).
// The caller closes them.
func (s *Stack) Files() ([]*os.File, error) { return tun.Files(s.dev) }

// Sources returns how many sockets Redirect takes.
func (s *Stack) Sources() int { return tun.Sources(s.dev) }

// Redirect makes the stack read its frames from sockets instead of the device (tun.Redirect); another process then
// reads the device. The stack runs and owns the sockets. Flows that begin in the meantime are among the keys after
// Redirect has returned.
func (s *Stack) Redirect(sockets []*os.File) error { return tun.Redirect(s.dev, sockets) }

// Elsewhere describes the flows that another process still carries over the same device. The stack that reads the
// device leaves their frames to that process.
type Elsewhere struct {
	mu    sync.RWMutex
	flows map[Key]struct{}
	to    []syscall.RawConn
	files []*os.File
	lost  atomic.Uint64
}

// NewElsewhere makes the description. Each of the sockets is the other end of one that the other process's stack got
// by Redirect. It takes ownership of them, even if it fails; Close closes them.
func NewElsewhere(flows []Key, sockets []*os.File) (*Elsewhere, error) {
	e := &Elsewhere{flows: make(map[Key]struct{}, len(flows)), files: sockets}
	for _, k := range flows {
		e.flows[k] = struct{}{}
	}
	if len(sockets) == 0 {
		return nil, errors.New("cannot leave frames to another process without a socket")
	}
	for _, f := range sockets {
		raw, err := f.SyscallConn()
		if err != nil {
			e.Close()
			return nil, err
		}
		e.to = append(e.to, raw)
	}
	return e, nil
}

// Ended tells that the other process does not carry these flows any more. It may be called from any goroutine.
func (e *Elsewhere) Ended(flows []Key) (left int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, k := range flows {
		delete(e.flows, k)
	}
	return len(e.flows)
}

// Keys returns the flows that the other process still carries. It may be called from any goroutine.
func (e *Elsewhere) Keys() []Key {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return slices.Collect(maps.Keys(e.flows))
}

// Lost returns how many frames the other process did not take, because it was behind or has ended.
func (e *Elsewhere) Lost() uint64 { return e.lost.Load() }

// Close closes the sockets, which ends the other process's stack. It may be called twice, and after SetElsewhere(nil).
func (e *Elsewhere) Close() {
	for _, f := range e.files {
		f.Close()
	}
}

// SetElsewhere makes the stack leave the frames of e's flows to another process from now on; nil: it handles all
// frames itself, which costs one load for each. It may be called from any goroutine, and before Run.
func (s *Stack) SetElsewhere(e *Elsewhere) { s.elsewhere.Store(e) }

// take reports whether the frame belongs to the other process alone, which has then got it. Frames that do not tell
// their flow, fragments and ICMP other than echo requests, are for both.
func (e *Elsewhere) take(h *tun.Header, b []byte) bool {
	p, ok := parseIP(b)
	if !ok {
		return false
	}
	switch {
	case isEcho(b, &p): // one answer is enough
		return false
	case p.later, p.proto == protoICMP, p.proto == protoICMPv6:
		port, _ := appPort(b, &p)
		e.send(h, b, port)
		return false
	case p.proto != protoTCP && p.proto != protoUDP, p.end-p.off < 4:
		return false
	}
	k := keyOf(b, &p)
	e.mu.RLock()
	_, theirs := e.flows[k]
	e.mu.RUnlock()
	if theirs {
		e.send(h, b, k.Src.Port())
	}
	return theirs
}

// keyOf returns the key of a TCP or UDP packet that contains its ports.
func keyOf(b []byte, p *packet) Key {
	src, dst := b[12:16], b[16:20]
	if p.v6 {
		src, dst = b[8:24], b[24:40]
	}
	at := func(addr, port []byte) netip.AddrPort {
		a, _ := netip.AddrFromSlice(addr)
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
	}
	k := Key{Proto: flow.UDP, Src: at(src, b[p.off:])}
	if p.proto == protoTCP {
		k.Proto, k.Dst = flow.TCP, at(dst, b[p.off+2:])
	}
	return k
}

// send passes a frame to the other process. All frames of a port use the same socket, so they stay in order.
func (e *Elsewhere) send(h *tun.Header, b []byte, port uint16) {
	var hdr [tun.HeaderLen]byte
	h.Put(hdr[:])
	var serr error
	err := e.to[int(port)%len(e.to)].Control(func(fd uintptr) {
		_, serr = unix.SendmsgBuffers(int(fd), [][]byte{hdr[:], b}, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
	if err != nil || serr != nil {
		e.lost.Add(1)
	}
}
