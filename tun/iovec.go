package tun

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIovecs is the kernel's UIO_MAXIOV: a frame of more parts cannot be written in one call.
const maxIovecs = 1024

// The file is non-blocking, so that neither call waits, and RawSyscall is right: the kernel's whole receive path runs in
// a write, 5 to 30 µs, and when the scheduler is told (Syscall) its monitor takes the processor away after 20 µs, wakes a
// thread for it and does not go back to sleep itself: a fifth of the CPU time of UDP round trips.

// reader is the arguments and the outcome of one readv, kept with the device so that a read allocates nothing: one
// goroutine reads at a time. Its closures are made once.
type reader struct {
	hdr     [HeaderLen]byte
	over    [1]byte // filled only when the frame did not fit
	iov     [3]unix.Iovec
	hdrLen  int
	n       int
	errno   syscall.Errno
	try     func(fd uintptr)
	tryWait func(fd uintptr) bool
}

func (r *reader) init(vnet bool) {
	if vnet {
		r.hdrLen = HeaderLen
	}
	r.iov[0].Base = &r.hdr[0]
	r.iov[0].SetLen(r.hdrLen)
	r.iov[2].Base = &r.over[0]
	r.iov[2].SetLen(len(r.over))
	r.try = r.readv
	r.tryWait = func(fd uintptr) bool {
		r.readv(fd)
		return r.errno != unix.EAGAIN
	}
}

// set puts b in place; nil takes it out again, so that the device does not keep it.
func (r *reader) set(b []byte) {
	r.iov[1].Base = unsafe.SliceData(b)
	r.iov[1].SetLen(len(b))
}

func (r *reader) readv(fd uintptr) {
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&r.iov[0])), uintptr(len(r.iov)))
		if errno == unix.EINTR {
			continue
		}
		r.n, r.errno = int(n), errno
		return
	}
}

// writer is the same for one writev. Writers are pooled, as many as write at once.
type writer struct {
	hdr   [HeaderLen]byte
	vnet  bool
	iov   []unix.Iovec
	errno syscall.Errno
	try   func(fd uintptr)
}

func newWriter(vnet bool) *writer {
	// A super-frame has up to 128 datagrams (UDP_MAX_SEGMENTS) and its headers.
	w := &writer{vnet: vnet, iov: make([]unix.Iovec, 0, 132)}
	w.try = w.writev
	return w
}

// set gathers the frame. What the kernel would misread or refuse for its size is refused here.
func (w *writer) set(h *Header, parts [][]byte) error {
	if w.vnet {
		Header{}.Put(w.hdr[:])
		if h != nil {
			h.Put(w.hdr[:])
		}
		w.add(w.hdr[:])
	} else if h != nil && (h.GSOType != GSONone || h.Flags&NeedsCsum != 0) {
		return ErrBadFrame // it would go out unfinished
	}
	n := 0
	for _, p := range parts {
		if len(p) != 0 {
			n += len(p)
			w.add(p)
		}
	}
	switch {
	case n == 0:
		return ErrBadFrame
	case n > MaxFrame || len(w.iov) > maxIovecs:
		return ErrTooLong
	}
	return nil
}

func (w *writer) add(b []byte) {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	w.iov = append(w.iov, v)
}

// reset forgets the caller's slices.
func (w *writer) reset() {
	clear(w.iov)
	w.iov = w.iov[:0]
}

func (w *writer) writev(fd uintptr) {
	for {
		_, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(w.iov))), uintptr(len(w.iov)))
		if errno != unix.EINTR {
			w.errno = errno
			return
		}
	}
}
