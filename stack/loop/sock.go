package loop

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls below do not wait on a non-blocking socket, so the Go scheduler is not told of them (unix.RawSyscall). A
// call that the scheduler knows and that takes 20 µs, as shutdown and close do when they send the FIN, costs the loop
// its processor: the runtime's monitor takes it away, wakes a thread for it, and keeps checking every 20 µs.

// Close closes the descriptor of a non-blocking socket whose SO_LINGER is off or 0. It may be called from any
// goroutine. The descriptor is closed even if Close returns an error (close(2)).
func Close(fd int) error { return raw(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// CloseWrite sends the FIN of a non-blocking socket after the bytes that were written. After a RST it returns
// unix.ENOTCONN.
func CloseWrite(fd int) error { return raw(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0) }

// SetOption is setsockopt(2) for an option whose value is an int.
func SetOption(fd, level, name, value int) error {
	v := int32(value)
	_, _, e := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)),
		unsafe.Sizeof(v), 0)
	if e != 0 {
		return e
	}
	return nil
}

func raw(call, a, b, c uintptr) error {
	if _, _, e := unix.RawSyscall(call, a, b, c); e != 0 {
		return e
	}
	return nil
}
