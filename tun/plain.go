package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// plainDevice is a TUN without the offload header. Each frame is one packet, which the wireguard device itself reads
// and writes. It is the fallback for an interface that was made without the header: it has one queue, and each frame
// is copied once.
type plainDevice struct {
	h      *handle
	name   string
	mtu    int
	closed atomic.Bool

	bufs  [][]byte // of the reader: as many as the wireguard device fills at once, which is one without the header
	sizes []int
	wr    sync.Pool // of *[]byte
}

// newPlain takes ownership of fd, even if it fails.
func newPlain(fd int, name string, o Options) (*plainDevice, error) {
	h, err := newHandle(fd, o)
	if err != nil {
		return nil, err
	}
	batch := h.dev.BatchSize()
	d := &plainDevice{h: h, name: name, mtu: o.MTU, bufs: make([][]byte, batch), sizes: make([]int, batch)}
	for i := range d.bufs {
		d.bufs[i] = make([]byte, MaxFrame)
	}
	d.wr.New = func() any { b := make([]byte, 0, MaxFrame); return &b }
	return d, nil
}

func (d *plainDevice) Name() string     { return d.name }
func (d *plainDevice) MTU() int         { return d.mtu }
func (d *plainDevice) Offload() Offload { return 0 }

func (d *plainDevice) Read(h *Header, b []byte, wait bool) (int, error) {
	if !wait {
		if ready, err := d.readable(); err != nil {
			return 0, d.readErr(err)
		} else if !ready {
			return 0, ErrAgain
		}
	}
	_, err := d.h.dev.Read(d.bufs, d.sizes, 0)
	for errors.Is(err, unix.ENOBUFS) { // its watch of the link lost messages; the queue itself never returns this error
		_, err = d.h.dev.Read(d.bufs, d.sizes, 0)
	}
	if err != nil {
		return 0, d.readErr(err)
	}
	*h = Header{}
	n := copy(b, d.bufs[0][:d.sizes[0]])
	if n < d.sizes[0] {
		return n, ErrTooLong
	}
	return n, nil
}

// readable reports whether a read would return at once.
func (d *plainDevice) readable() (ready bool, err error) {
	err = d.h.control(func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(p, 0)
			if err != unix.EINTR {
				ready = n > 0
				return err
			}
		}
	})
	return ready, err
}

func (d *plainDevice) readErr(err error) error {
	switch {
	case d.closed.Load():
		return os.ErrClosed
	case errors.Is(err, os.ErrClosed): // the wireguard device returns this if the interface is gone
		return errDeleted("read from", d.name)
	}
	return fmt.Errorf("cannot read from the TUN device %s: %w", d.name, err)
}

func (d *plainDevice) Write(h *Header, parts [][]byte) error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	if h != nil && (h.GSOType != GSONone || h.Flags&NeedsCsum != 0) {
		return ErrBadFrame // it would be sent unfinished
	}
	if len(parts) > maxIovecs {
		return ErrTooLong
	}
	frame := d.wr.Get().(*[]byte)
	defer d.wr.Put(frame)
	b := (*frame)[:0]
	for _, p := range parts {
		if len(b)+len(p) > MaxFrame {
			return ErrTooLong
		}
		b = append(b, p...)
	}
	if len(b) == 0 {
		return ErrBadFrame
	}
	_, err := d.h.dev.Write([][]byte{b}, 0)
	var errno unix.Errno
	switch {
	case err == nil:
		return nil
	case d.closed.Load():
		return os.ErrClosed
	case errors.Is(err, os.ErrClosed):
		return errDeleted("write to", d.name)
	case errors.As(err, &errno):
		return writeErr(d.name, errno)
	}
	return fmt.Errorf("cannot write to the TUN device %s: %w", d.name, err)
}

func (d *plainDevice) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	return d.h.close()
}
