package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Owner describes the owner of a socket.
type Owner struct {
	UID    uint32 // user who made the socket
	Inode  uint32 // of the socket, as in /proc/PID/fd
	Cgroup uint64 // inode of the control group (version 2) in which the socket was made; 0: unknown to the kernel
}

// inetDiagCgroupID is INET_DIAG_CGROUP_ID of linux/inet_diag.h, since Linux 5.8.
const inetDiagCgroupID = 21

// owner reads the message that match was called with. The caller holds d.mu.
func (d *Diag) owner(m *diagMsg) Owner {
	ne := binary.NativeEndian
	o := Owner{UID: ne.Uint32(m[64:]), Inode: ne.Uint32(m[68:])}
	for b := d.attrs; len(b) >= unix.SizeofRtAttr; {
		size := int(ne.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			break
		}
		if ne.Uint16(b[2:]) == inetDiagCgroupID && size == unix.SizeofRtAttr+8 {
			o.Cgroup = ne.Uint64(b[unix.SizeofRtAttr:])
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return o
}

// Owner finds the owner of the socket of the IP protocol proto (6 or 17) that sent from src to dst. found is false if
// there is no such socket. The errors are those of Exists.
func (d *Diag) Owner(proto uint8, src, dst netip.AddrPort) (o Owner, found bool, err error) {
	src = netip.AddrPortFrom(src.Addr().Unmap().WithZone(""), src.Port())
	dst = netip.AddrPortFrom(dst.Addr().Unmap().WithZone(""), dst.Port())
	if !src.IsValid() || !dst.IsValid() || src.Addr().Is4() != dst.Addr().Is4() {
		return o, false, errors.New("cannot ask for a socket: no pair of endpoints")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	req := d.request(family(src), proto, 0, ^uint32(0))
	switch proto {
	case unix.IPPROTO_TCP:
		req.endpoints(src, dst)
	case unix.IPPROTO_UDP: // the look-up has the view of an incoming datagram
		req.endpoints(dst, src)
	default:
		return o, false, fmt.Errorf("cannot ask for a socket of protocol %d", proto)
	}
	found, err = d.ask(func(m *diagMsg) bool {
		if proto == unix.IPPROTO_TCP && (m.src() != src || m.dst() != dst) {
			return false // a listener on the same port
		}
		o = d.owner(m)
		return true
	})
	return o, found, err
}

// Listener finds the owner of the TCP socket that listens at the endpoint, or at its port on a wildcard address.
func (d *Diag) Listener(at netip.AddrPort) (o Owner, found bool, err error) {
	at = netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port())
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, fam := range []uint8{family(at), unix.AF_INET6} { // an IPv6 socket may listen for both families
		req := d.request(fam, unix.IPPROTO_TCP, unix.NLM_F_DUMP, 1<<unix.BPF_TCP_LISTEN)
		req.sport(at.Port())
		found, err = d.ask(func(m *diagMsg) bool {
			src := m.src()
			if src.Port() != at.Port() || src.Addr() != at.Addr() && !src.Addr().IsUnspecified() {
				return false
			}
			o = d.owner(m)
			return true
		})
		if found || err != nil {
			return o, found, err
		}
	}
	return o, false, nil
}
