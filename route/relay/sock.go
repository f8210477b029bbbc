package relay

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// The sockets are non-blocking, so none of these calls waits, and RawSyscall is right: telling the scheduler of each
// call (entersyscall) costs more than it brings, and risks losing the processor for a call of microseconds.

// setup prepares a connected socket. It sets keepalive, and urgent data in line as on the app's side, because
// FIONREAD otherwise stops at an urgent mark. The maker of the socket has set TCP_NODELAY, because the app's own
// stack has already decided what is sent together.
func setup(fd, idle int) {
	// None of these calls can fail on a connected TCP socket. On another kind (a unix socket) the flow works without
	// them.
	_ = loop.SetOption(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	_ = loop.SetOption(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	if idle > 0 {
		_ = loop.SetOption(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, idle)
	}
}

// unread returns FIONREAD: how many bytes recv would return now.
func unread(fd int) int { return ioctlInt(fd, unix.TIOCINQ) }

// unacked returns SIOCOUTQ: how many bytes the peer has not acknowledged.
func unacked(fd int) int { return ioctlInt(fd, unix.SIOCOUTQ) }

func ioctlInt(fd int, req uintptr) int {
	var n int32
	if _, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0
	}
	return int(n)
}

// sockError returns and clears the socket's pending error.
func sockError(fd int) unix.Errno {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		if e, ok := err.(unix.Errno); ok {
			return e
		}
		return unix.EIO
	}
	return unix.Errno(n)
}

func recv(fd int, b []byte, flags int) (int, unix.Errno) {
	if len(b) == 0 {
		return 0, 0
	}
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
			uintptr(flags|unix.MSG_DONTWAIT), 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), 0
	}
}

// send writes without blocking.
func send(fd int, b []byte) (int, unix.Errno) {
	if len(b) == 0 {
		return 0, 0
	}
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), 0
	}
}

// vec is the argument of sendmsg, kept in the loop so that nothing is allocated.
type vec struct {
	msg unix.Msghdr
	iov [2]unix.Iovec
}

// send writes a and b, in this order, in one call.
func (v *vec) send(fd int, a, b []byte) (int, unix.Errno) {
	v.iov[0].Base, v.iov[1].Base = &a[0], &b[0]
	v.iov[0].SetLen(len(a))
	v.iov[1].SetLen(len(b))
	v.msg.Iov = &v.iov[0]
	v.msg.SetIovlen(2)
	defer func() { v.iov = [2]unix.Iovec{} }()
	for {
		n, _, e := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&v.msg)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), 0
	}
}
