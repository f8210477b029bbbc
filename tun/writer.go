package tun

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIovecs is the kernel's UIO_MAXIOV. A frame of more parts cannot be written in one call.
const maxIovecs = 1024

// The files are non-blocking, so no call waits, and RawSyscall is right. The kernel's whole receive path runs inside
// a write, which takes 5 to 30 µs. If the scheduler knew of the call (Syscall), its monitor would take the processor
// away after 20 µs, wake a thread for it and stay awake itself: a fifth of the CPU time of UDP round trips.

// writer holds the arguments and the result of one writev. Writers are pooled; there are as many as concurrent
// writes.
type writer struct {
	hdr   [HeaderLen]byte
	fd    int // of the queue
	iov   []unix.Iovec
	errno syscall.Errno
	try   func(uintptr)
}

func newWriter() *writer {
	// A super-frame consists of up to 128 datagrams (UDP_MAX_SEGMENTS) and its headers.
	w := &writer{iov: make([]unix.Iovec, 0, 132)}
	w.try = w.writev
	return w
}

// set collects the frame. It refuses a frame whose size the kernel would misread or refuse.
func (w *writer) set(h *Header, parts [][]byte) error {
	Header{}.Put(w.hdr[:])
	if h != nil {
		h.Put(w.hdr[:])
	}
	w.add(w.hdr[:])
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

// reset drops the references to the caller's slices.
func (w *writer) reset() {
	clear(w.iov)
	w.iov = w.iov[:0]
}

func (w *writer) writev(uintptr) {
	for {
		_, _, errno := syscall.RawSyscall(
			unix.SYS_WRITEV,
			uintptr(w.fd),
			uintptr(unsafe.Pointer(unsafe.SliceData(w.iov))),
			uintptr(len(w.iov)),
		)
		if errno != unix.EINTR {
			w.errno = errno
			return
		}
	}
}
