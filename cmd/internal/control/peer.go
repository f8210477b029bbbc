package control

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peer is the process that connected, according to the kernel.
type peer struct {
	uid, gid uint32
	pid      int32
	groups   []uint32
	err      error
}

// maxGroups is NGROUPS_MAX of Linux.
const maxGroups = 65536

func peerOf(c *net.UnixConn) (p peer) {
	p.uid, p.gid, p.err = ^uint32(0), ^uint32(0), errors.New("nothing is known of the peer")
	raw, err := c.SyscallConn()
	if err != nil {
		return p
	}
	_ = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, p.err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); p.err != nil {
			return
		}
		p.uid, p.gid, p.pid = cred.Uid, cred.Gid, cred.Pid
		p.groups = peerGroups(int(fd))
	})
	return p
}

// peerGroups returns the supplementary groups of the peer, or none if they are not available (before Linux 4.13).
func peerGroups(fd int) []uint32 {
	b := make([]byte, 4*64)
	for {
		n := uint32(len(b))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
		if errno == unix.ERANGE && int(n) > len(b) && n <= 4*maxGroups {
			b = make([]byte, n)
			continue
		}
		if errno != 0 || int(n) > len(b) {
			return nil
		}
		groups := make([]uint32, 0, n/4)
		for b := b[:n&^3]; len(b) > 0; b = b[4:] {
			groups = append(groups, binary.NativeEndian.Uint32(b))
		}
		return groups
	}
}

// owner reports whether the peer is root or the user that the daemon runs as.
func (p peer) owner() bool {
	return p.err == nil && (p.uid == 0 || int(p.uid) == os.Geteuid())
}

// in reports whether gid is one of the peer's groups. A negative gid is in no group.
func (p peer) in(gid int) bool {
	if p.err != nil || gid < 0 {
		return false
	}
	for _, g := range append([]uint32{p.gid}, p.groups...) {
		if int64(g) == int64(gid) {
			return true
		}
	}
	return false
}
