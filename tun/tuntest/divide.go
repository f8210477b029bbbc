package tuntest

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/tun"
)

// wire is one direction of a Pipe: one queue, or several for an end that was divided.
type wire struct {
	queues atomic.Pointer[[]*queue]
	// number of the part that last wrote to a flow, from 1 on, by the flow's hash as in the kernel
	flows [flowEntries]atomic.Uint32
	mu    sync.RWMutex // guards tap
	tap   func(h tun.Header, frame []byte) bool
}

const flowEntries = 1024

func newWire() *wire {
	w := new(wire)
	w.queues.Store(&[]*queue{newQueue()})
	return w
}

// queue returns the queue for a frame: that from which the flow was last written, or that of its hash.
func (w *wire) queue(parts [][]byte) *queue {
	qs := *w.queues.Load()
	if len(qs) == 1 {
		return qs[0]
	}
	h := flowHash(parts)
	if i := w.flows[h%flowEntries].Load(); i != 0 {
		return qs[i-1]
	}
	return qs[h>>16%uint32(len(qs))]
}

// moved records that a part wrote a frame.
func (w *wire) moved(parts [][]byte, part int) {
	w.flows[flowHash(parts)%flowEntries].Store(uint32(part))
}

// Forget assigns every flow to a queue by its hash again, as the kernel does some seconds after the last frame to it.
func (d *Device) Forget() {
	for _, w := range []*wire{d.in, d.out} {
		for i := range w.flows {
			w.flows[i].Store(0)
		}
	}
}

// flowHash is the same for both directions of a flow, as in the kernel. It is 0 for a frame without ports.
func flowHash(parts [][]byte) uint32 {
	var head [60]byte
	b := head[:0]
	for _, p := range parts {
		b = append(b, p[:min(len(p), len(head)-len(b))]...)
	}
	var x uint32
	ports := 40
	switch {
	case len(b) >= 24 && b[0]>>4 == 4 && (b[9] == 6 || b[9] == 17) && b[6]&0x1f|b[7] == 0:
		x = binary.BigEndian.Uint32(b[12:]) ^ binary.BigEndian.Uint32(b[16:])
		ports = int(b[0]&15) * 4
	case len(b) >= 44 && b[0]>>4 == 6 && (b[6] == 6 || b[6] == 17):
		for i := 8; i < 40; i += 4 {
			x ^= binary.BigEndian.Uint32(b[i:])
		}
	default:
		return 0
	}
	if len(b) < ports+4 {
		return 0
	}
	x = (x ^ uint32(binary.BigEndian.Uint16(b[ports:])^binary.BigEndian.Uint16(b[ports+2:]))) * 0x85EBCA6B
	return x ^ x>>15
}

// Divide splits this end into n parts, each with its own queue, as tun.Divide does with a device of the kernel.
// Frames that are already queued are lost.
func (d *Device) Divide(n int) ([]tun.Part, error) {
	if d.own != nil || n < 1 {
		return nil, errors.New("cannot divide this end of the pipe")
	}
	queues, parts := make([]*queue, n), make([]tun.Part, n)
	for k := range n {
		queues[k] = newQueue()
		parts[k] = &Device{name: d.name, mtu: d.mtu, off: d.off, in: d.in, out: d.out, own: queues[k], part: k + 1}
	}
	d.in.queues.Store(&queues)
	return parts, nil
}

// Wake implements tun.Part.
func (d *Device) Wake() {
	q := d.own
	if q == nil {
		q = (*d.in.queues.Load())[0]
	}
	q.mu.Lock()
	q.woke = true
	q.mu.Unlock()
	q.more.Signal()
}
