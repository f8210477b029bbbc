package privsock

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Peer is the process that connected, according to the kernel.
type Peer struct {
	UID, GID uint32
	PID      int32
	Groups   []uint32
	Err      error // nothing is known of it
}

// maxGroups is NGROUPS_MAX of Linux.
const maxGroups = 65536

// PeerOf returns the process at the other end of c.
func PeerOf(c *net.UnixConn) (p Peer) {
	p.UID, p.GID, p.Err = ^uint32(0), ^uint32(0), errors.New("the peer is unknown")
	raw, err := c.SyscallConn()
	if err != nil {
		return p
	}
	_ = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, p.Err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); p.Err != nil {
			return
		}
		p.UID, p.GID, p.PID = cred.Uid, cred.Gid, cred.Pid
		p.Groups = peerGroups(int(fd))
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

// Owner reports whether the peer is root or the user that the daemon runs as.
func (p Peer) Owner() bool {
	return p.Err == nil && (p.UID == 0 || int(p.UID) == os.Geteuid())
}

// In reports whether gid is one of the peer's groups. A negative gid is in no group.
func (p Peer) In(gid int) bool {
	if p.Err != nil || gid < 0 {
		return false
	}
	for _, g := range append([]uint32{p.GID}, p.Groups...) {
		if int64(g) == int64(gid) {
			return true
		}
	}
	return false
}
