package relay

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// skMeminfoDrops is the index of the drops among the numbers of SO_MEMINFO: SK_MEMINFO_DROPS of linux/sock_diag.h.
const skMeminfoDrops = 8

// dropsOf returns how many packets the kernel has dropped because the receive buffer of a socket was full.
// SO_RXQ_OVFL reports the same number with each datagram, at a cost for each; SO_MEMINFO (Linux 4.12) reports it on
// request.
func dropsOf(fd int) uint64 {
	var info [skMeminfoDrops + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, e := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if e != 0 || size <= 4*skMeminfoDrops {
		return 0
	}
	return uint64(info[skMeminfoDrops])
}
