package tun

import (
	"net"

	"golang.org/x/sys/unix"
)

// setUDPSegment lets the kernel cut what c sends into datagrams of size bytes.
func setUDPSegment(c *net.UDPConn, size int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size)
	}); cerr != nil {
		return cerr
	}
	return err
}
