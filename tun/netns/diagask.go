package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var errDiagTimeout = errors.New("no answer from the kernel")

// ask sends the query that request has put into the buffer and reads the answer to its end. found tells whether match
// accepted a socket of the answer. ENOENT is not an error: it means that there is no such socket. The caller holds
// d.mu.
func (d *Diag) ask(match func(*diagMsg) bool) (found bool, err error) {
	if d.fd < 0 {
		return false, fmt.Errorf("cannot ask for a socket: %w", os.ErrClosed)
	}
	dump := binary.NativeEndian.Uint16(d.buf[6:])&unix.NLM_F_DUMP != 0
	kernel := unix.RawSockaddrNetlink{Family: unix.AF_NETLINK}
	if _, _, errno := syscall.Syscall6(unix.SYS_SENDTO, uintptr(d.fd), uintptr(unsafe.Pointer(&d.buf[0])), diagReqLen, 0,
		uintptr(unsafe.Pointer(&kernel)), unix.SizeofSockaddrNetlink); errno != 0 {
		return false, fmt.Errorf("cannot ask for a socket: %w", errno)
	}
	deadline := time.Now().Add(diagTimeout)
	for {
		n, err := d.receive(deadline)
		if err != nil {
			return false, fmt.Errorf("cannot ask for a socket: %w", err)
		}
		f, done, err := d.parse(d.buf[:n], dump, match)
		found = found || f
		if err == unix.ENOENT && !dump {
			return false, nil
		} else if err != nil {
			return false, fmt.Errorf("cannot ask for a socket: %w", err)
		}
		if done {
			return found, nil
		}
	}
}

// receive reads one datagram of the kernel into the buffer and ignores any other sender: a program with CAP_NET_ADMIN
// in the namespace could send to this socket.
func (d *Diag) receive(deadline time.Time) (int, error) {
	for {
		var from unix.RawSockaddrNetlink
		size := uint32(unix.SizeofSockaddrNetlink)
		n, _, errno := syscall.Syscall6(unix.SYS_RECVFROM, uintptr(d.fd), uintptr(unsafe.Pointer(&d.buf[0])), uintptr(len(d.buf)),
			unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
		switch {
		case errno == 0 && from.Pid == 0:
			return int(n), nil
		case errno == unix.EAGAIN:
			left := time.Until(deadline)
			if left <= 0 {
				return 0, errDiagTimeout
			}
			p := []unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(p, int(left/time.Millisecond)+1); err != nil && err != unix.EINTR {
				return 0, err
			}
		case errno != 0 && errno != unix.EINTR:
			return 0, errno
		case !time.Now().Before(deadline):
			return 0, errDiagTimeout
		}
	}
}

// parse reads the messages of one datagram. done means that the answer is complete. Answers to earlier queries, left
// over after a timeout, are recognized by their sequence number and skipped.
func (d *Diag) parse(b []byte, dump bool, match func(*diagMsg) bool) (found, done bool, err error) {
	for len(b) >= nlHdrLen {
		size := int(binary.NativeEndian.Uint32(b))
		if size < nlHdrLen || size > len(b) {
			return false, false, errors.New("malformed answer")
		}
		body := b[nlHdrLen:size]
		if binary.NativeEndian.Uint32(b[8:]) == d.seq {
			switch typ := binary.NativeEndian.Uint16(b[4:]); typ {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				if len(body) >= 4 {
					if code := int32(binary.NativeEndian.Uint32(body)); code < 0 {
						return false, true, syscall.Errno(-code)
					}
				}
				return found, true, nil
			case sockByFam:
				if len(body) < diagMsgLen {
					return false, false, errors.New("malformed answer")
				}
				d.attrs = body[diagMsgLen:]
				found = found || match((*diagMsg)(body))
				d.attrs = nil
				done = done || !dump
			}
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return found, done, nil
}
