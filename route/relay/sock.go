package relay

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// The sockets are non-blocking, so none of these calls waits, and RawSyscall is right: telling the scheduler of each
// (entersyscall) costs more than it brings, and risks the processor for what takes microseconds.

// setup prepares a connected socket: keepalive, and urgent data in line, as the app's side has it: FIONREAD stops at an
// urgent mark otherwise. TCP_NODELAY who made the socket has set: the app's own stack has already decided what goes together.
func setup(fd, idle int) {
	// None of these can fail on a connected TCP socket; on another kind (a unix socket) the flow works without.
	_ = loop.SetOption(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	_ = loop.SetOption(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	if idle > 0 {
		_ = loop.SetOption(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, idle)
	}
}

// unread is FIONREAD: how many bytes recv would give now.
func unread(fd int) int { return ioctlInt(fd, unix.TIOCINQ) }

// unacked is SIOCOUTQ: how many bytes the peer has not acknowledged.
func unacked(fd int) int { return ioctlInt(fd, unix.SIOCOUTQ) }

func ioctlInt(fd int, req uintptr) int {
	var n int32
	if _, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0
	}
	return int(n)
}

// sockError takes the socket's pending error.
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

// vec is what sendmsg takes, kept in the loop so that nothing is allocated.
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
