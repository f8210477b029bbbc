package socks

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockaddrRoom is an endpoint in the kernel's format, stored in place because unix.Connect would allocate.
type sockaddrRoom struct {
	raw  unix.RawSockaddrInet6 // large enough for both families
	size uintptr
}

// set stores ap in s. It fails if the zone names no interface.
func (s *sockaddrRoom) set(ap netip.AddrPort) error {
	ip := ap.Addr().Unmap()
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], ap.Port())
	port := binary.NativeEndian.Uint16(b[:])
	if ip.Is4() {
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&s.raw)) = unix.RawSockaddrInet4{
			Family: unix.AF_INET,
			Port:   port,
			Addr:   ip.As4(),
		}
		s.size = unix.SizeofSockaddrInet4
		return nil
	}
	s.raw = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: ip.As16()}
	s.size = unix.SizeofSockaddrInet6
	if z := ip.Zone(); z != "" {
		i, err := zoneIndex(z)
		if err != nil {
			return err
		}
		s.raw.Scope_id = i
	}
	return nil
}

func (s *sockaddrRoom) domain() int { return int(s.raw.Family) }

// connect is connect(2) for a non-blocking socket. It returns 0 if the socket was connected at once.
func (s *sockaddrRoom) connect(fd int) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), s.size)
	return e
}

// zoneIndex returns the index of the interface that a zone gives by name or number.
func zoneIndex(zone string) (uint32, error) {
	i, err := net.InterfaceByName(zone)
	if err == nil {
		return uint32(i.Index), nil
	}
	if n, nerr := strconv.ParseUint(zone, 10, 32); nerr == nil && n > 0 {
		return uint32(n), nil
	}
	return 0, err
}
