// Package tuntest provides a TUN device in memory, for tests of the layers above: it needs no privilege and no
// kernel.
//
// A Pipe is two devices back to back: what is written to one is read from the other, with its Header unchanged. One
// end is given to the stack under test, the other to the app's stack, which stands for the kernel. Frames are checked
// on write as in the kernel, and a full queue drops frames. A stack that works on a Pipe therefore does not meet its
// first refusal on a real device.
package tuntest

import (
	"os"
	"sync"

	"github.com/viasocks/viasocks/tun"
)

// QueueFrames is how many frames wait in each direction before one is dropped, as many as two TUN rings (txqueuelen
// 500) hold.
const QueueFrames = 1024

// Device is one end of a Pipe. All methods may be called concurrently.
type Device struct {
	name string
	mtu  int
	off  tun.Offload
	in   *wire // what the other end wrote
	out  *wire
	own  *queue // the queue of in that Read reads; nil: all of them
	part int    // number of this part, from 1 on
}

var _ tun.Device = (*Device)(nil)

// Pipe returns two devices back to back. After one end was closed, the other's Read returns os.ErrClosed once the
// queue is empty, as when a kernel's device is gone, and its Write fails.
func Pipe(mtu int, off tun.Offload) (a, b *Device) {
	ab, ba := newWire(), newWire()
	a = &Device{name: "pipe0", mtu: mtu, off: off, in: ba, out: ab}
	b = &Device{name: "pipe1", mtu: mtu, off: off, in: ab, out: ba}
	return a, b
}

// Name returns pipe0 or pipe1.
func (d *Device) Name() string { return d.name }

// MTU returns the argument of Pipe.
func (d *Device) MTU() int { return d.mtu }

// Offload returns the argument of Pipe.
func (d *Device) Offload() tun.Offload { return d.off }

// Tap sets a function that is called for each frame written to this end before it is queued. If f returns false, the
// frame is dropped. nil removes the function. The frame is valid only during the call, and f must not write to this
// end.
func (d *Device) Tap(f func(h tun.Header, frame []byte) bool) {
	d.out.mu.Lock()
	d.out.tap = f
	d.out.mu.Unlock()
}

// Dropped returns how many frames written to this end were lost because the queue was full.
func (d *Device) Dropped() uint64 {
	var n uint64
	for _, q := range *d.out.queues.Load() {
		q.mu.Lock()
		n += q.dropped
		q.mu.Unlock()
	}
	return n
}

// Read implements tun.Device.
func (d *Device) Read(h *tun.Header, b []byte, wait bool) (int, error) {
	q := d.own
	if q == nil {
		q = (*d.in.queues.Load())[0]
	}
	return q.get(h, b, wait)
}

// Write implements tun.Device. It refuses what the kernel refuses (tun.ErrBadFrame).
func (d *Device) Write(h *tun.Header, parts [][]byte) error {
	var hdr tun.Header
	if h != nil {
		hdr = *h
	}
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if n > tun.MaxFrame {
		return tun.ErrTooLong
	}
	if !d.takes(hdr, n, parts) {
		return tun.ErrBadFrame
	}
	d.out.mu.RLock()
	tap := d.out.tap
	d.out.mu.RUnlock()
	if d.part != 0 {
		d.in.moved(parts, d.part)
	}
	return d.out.queue(parts).put(hdr, parts, n, tap)
}

// takes does the checks of tun_get_user and virtio_net_hdr_to_skb.
func (d *Device) takes(h tun.Header, n int, parts [][]byte) bool {
	var version byte
	for _, p := range parts {
		if len(p) > 0 {
			version = p[0] >> 4
			break
		}
	}
	if version != 4 && version != 6 {
		return false
	}
	if d.off&tun.VnetHdr == 0 {
		return h.GSOType == tun.GSONone && h.Flags&tun.NeedsCsum == 0
	}
	if int(h.HdrLen) > n {
		return false
	}
	if h.Flags&tun.NeedsCsum != 0 && int(h.CsumStart)+int(h.CsumOffset)+2 > n {
		return false
	}
	switch h.GSOType &^ tun.GSOECN {
	case tun.GSONone:
		return h.GSOType == tun.GSONone
	case tun.GSOTCPv4, tun.GSOTCPv6:
		return h.GSOSize > 0 && h.Flags&tun.NeedsCsum != 0 && d.off&tun.TSO != 0
	case tun.GSOUDPL4:
		return h.GSOSize > 0 && h.Flags&tun.NeedsCsum != 0 && d.off&tun.USO != 0
	}
	return false
}

// Close implements tun.Device.
func (d *Device) Close() error {
	if d.own != nil {
		d.own.close(true)
		return nil
	}
	for _, q := range *d.in.queues.Load() {
		q.close(true)
	}
	for _, q := range *d.out.queues.Load() {
		q.close(false)
	}
	return nil
}

type frame struct {
	h tun.Header
	b []byte
}

// queue is one direction: a ring of frames with reused buffers.
type queue struct {
	mu      sync.Mutex
	more    sync.Cond
	ring    [QueueFrames]frame
	head, n int
	closed  bool
	woke    bool // a waiting get must return without a frame
	dropped uint64
}

func newQueue() *queue {
	q := new(queue)
	q.more.L = &q.mu
	return q
}

func (q *queue) put(h tun.Header, parts [][]byte, n int, tap func(tun.Header, []byte) bool) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return os.ErrClosed
	}
	if q.n == QueueFrames {
		q.dropped++
		return tun.ErrAgain
	}
	f := &q.ring[(q.head+q.n)%QueueFrames]
	f.h = h
	if cap(f.b) < n {
		f.b = make([]byte, 0, max(n, 2048))
	}
	f.b = f.b[:0]
	for _, p := range parts {
		f.b = append(f.b, p...)
	}
	if tap != nil && !tap(h, f.b) {
		return nil
	}
	q.n++
	q.more.Signal()
	return nil
}

func (q *queue) get(h *tun.Header, b []byte, wait bool) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.n == 0 {
		if q.closed {
			return 0, os.ErrClosed
		}
		if !wait || q.woke {
			q.woke = false
			return 0, tun.ErrAgain
		}
		q.more.Wait()
	}
	f := &q.ring[q.head]
	q.head = (q.head + 1) % QueueFrames
	q.n--
	*h = f.h
	n := copy(b, f.b)
	if n < len(f.b) {
		return n, tun.ErrTooLong
	}
	return n, nil
}

// close ends the direction. The reader's own Close also drops what is queued.
func (q *queue) close(byReader bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	if byReader {
		q.n = 0
	}
	q.more.Broadcast()
}
