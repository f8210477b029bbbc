package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// diagTimeout limits a query. The kernel answers before the send returns, so the timeout only ends what should not
// happen.
const diagTimeout = 100 * time.Millisecond

// Diag queries the sockets of a network namespace (sock_diag(7)): that of the thread which opened it, wherever the
// Diag is used. Its methods may be called concurrently. One query runs at a time and takes about 3 µs.
type Diag struct {
	mu    sync.Mutex
	fd    int // -1: closed
	seq   uint32
	index uint32
	buf   []byte
	attrs []byte // attributes after the message, valid while match is called
}

// OpenDiag opens a sock_diag socket in the network namespace of the calling thread and sends a test query. It fails
// if the kernel lacks tcp_diag or udp_diag, because every later answer would be "no such socket".
func OpenDiag() (*Diag, error) {
	fd, err := openDiagSocket()
	if err != nil {
		return nil, err
	}
	return newDiag(fd)
}

func openDiagSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return -1, fmt.Errorf("cannot open a sock_diag socket: %w", err)
	}
	return fd, nil
}

// DiagFromFile is OpenDiag for a sock_diag socket that was opened elsewhere. It takes ownership of f, even if it
// fails.
func DiagFromFile(f *os.File) (*Diag, error) {
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("cannot use the sock_diag socket: %w", err)
	}
	var fd int
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) })
	if err := errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("cannot use the sock_diag socket: %w", err)
	}
	return newDiag(fd)
}

func newDiag(fd int) (*Diag, error) {
	d := &Diag{fd: fd, buf: make([]byte, 32<<10)}
	for _, m := range []struct {
		proto  uint8
		module string
	}{{unix.IPPROTO_TCP, "tcp_diag"}, {unix.IPPROTO_UDP, "udp_diag"}} {
		// An empty dump distinguishes the two meanings of ENOENT: without the module, it fails.
		d.request(unix.AF_INET, m.proto, unix.NLM_F_DUMP, 0)
		if _, err := d.ask(func(*diagMsg) bool { return false }); err != nil {
			d.Close()
			return nil, fmt.Errorf("cannot ask the kernel about sockets (module %s): %w", m.module, err)
		}
	}
	return d, nil
}

// SetInterface sets the index of the TUN in the namespace. Without it, sockets that are bound to a device
// (SO_BINDTODEVICE) are not found.
func (d *Diag) SetInterface(index int) {
	d.mu.Lock()
	d.index = uint32(index)
	d.mu.Unlock()
}

// Close closes the socket. It may be called twice.
func (d *Diag) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return nil
	}
	err := unix.Close(d.fd)
	d.fd = -1
	return err
}

// Exists reports whether the namespace has a socket of the IP protocol proto (6 or 17) with the local endpoint src.
//
// For TCP it looks for the socket with exactly this source and destination, in any state including SYN_SENT, but not
// for one in TIME_WAIT or a listener on the same port. For UDP it looks for a socket that would receive a datagram
// from dst to src: bound to src or to a wildcard address of either family, and not connected elsewhere. If dst is
// zero, any socket bound to src counts, whether connected or not. This costs more (20 µs and above), because the
// kernel searches its table.
//
// An error means that the query failed: there was no answer within 100 ms, the Diag is closed, or proto is another
// protocol.
func (d *Diag) Exists(proto uint8, src, dst netip.AddrPort) (bool, error) {
	src = netip.AddrPortFrom(src.Addr().Unmap().WithZone(""), src.Port())
	dst = netip.AddrPortFrom(dst.Addr().Unmap().WithZone(""), dst.Port())
	if !src.IsValid() {
		return false, errors.New("cannot ask for a socket: no source address")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch proto {
	case unix.IPPROTO_TCP:
		return d.tcp(src, dst)
	case unix.IPPROTO_UDP:
		return d.udp(src, dst)
	}
	return false, fmt.Errorf("cannot ask for a socket of protocol %d", proto)
}

func (d *Diag) tcp(src, dst netip.AddrPort) (bool, error) {
	req := d.request(family(src), unix.IPPROTO_TCP, 0, ^uint32(0))
	req.endpoints(src, dst)
	return d.ask(func(m *diagMsg) bool {
		switch m.state() {
		case unix.BPF_TCP_TIME_WAIT, unix.BPF_TCP_CLOSE, unix.BPF_TCP_LISTEN:
			return false // the look-up falls back to a listener
		}
		return m.src() == src && m.dst() == dst
	})
}

func (d *Diag) udp(src, dst netip.AddrPort) (bool, error) {
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	remote := dst
	if !dst.IsValid() || dst.Addr().Is4() != src.Addr().Is4() {
		remote = netip.AddrPortFrom(any4, 0)
		if src.Addr().Is6() {
			remote = netip.AddrPortFrom(any6, 0)
		}
	}
	// The exact look-up has the view of an incoming datagram, whose source is the far end. With AF_INET it also finds
	// dual-stack sockets.
	req := d.request(family(src), unix.IPPROTO_UDP, 0, ^uint32(0))
	req.endpoints(remote, src)
	found, err := d.ask(func(*diagMsg) bool { return true })
	if found || err != nil || dst.IsValid() {
		return found, err
	}
	local := func(m *diagMsg) bool {
		a := m.src().Addr()
		return m.src().Port() == src.Port() && (a == src.Addr() || a == any6 || a == any4)
	}
	for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if fam == unix.AF_INET && src.Addr().Is6() {
			continue
		}
		req := d.request(fam, unix.IPPROTO_UDP, unix.NLM_F_DUMP, ^uint32(0))
		req.sport(src.Port())
		if found, err = d.ask(local); found || err != nil {
			return found, err
		}
	}
	return false, nil
}

// BoundUDP calls visit with the local endpoint of each UDP socket of the namespace. The address is unspecified, of
// either family, if the socket is bound to all addresses. Sockets that are bound or connected during the call may be
// missed.
func (d *Diag) BoundUDP(visit func(local netip.AddrPort)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
		d.request(fam, unix.IPPROTO_UDP, unix.NLM_F_DUMP, ^uint32(0))
		if _, err := d.ask(func(m *diagMsg) bool { visit(m.src()); return false }); err != nil {
			return err
		}
	}
	return nil
}

func family(a netip.AddrPort) uint8 {
	if a.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// diagReq is an nlmsghdr and an inet_diag_req_v2 (linux/inet_diag.h) in the Diag's buffer.
type diagReq []byte

const (
	nlHdrLen   = unix.SizeofNlMsghdr
	diagReqLen = nlHdrLen + 56
	diagMsgLen = 72
	sockByFam  = 20 // SOCK_DIAG_BY_FAMILY
)

// request begins a query. The caller holds d.mu.
func (d *Diag) request(family, proto uint8, flags uint16, states uint32) diagReq {
	d.seq++
	b := d.buf[:diagReqLen]
	clear(b)
	ne := binary.NativeEndian
	ne.PutUint32(b, diagReqLen)
	ne.PutUint16(b[4:], sockByFam)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	ne.PutUint32(b[8:], d.seq)
	b[16], b[17] = family, proto
	ne.PutUint32(b[20:], states)
	ne.PutUint32(b[60:], d.index)
	if flags&unix.NLM_F_DUMP == 0 {
		ne.PutUint64(b[64:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	}
	return b
}

func (b diagReq) sport(p uint16) { binary.BigEndian.PutUint16(b[24:], p) }

func (b diagReq) endpoints(src, dst netip.AddrPort) {
	b.sport(src.Port())
	binary.BigEndian.PutUint16(b[26:], dst.Port())
	putAddr(b[28:44], src.Addr())
	putAddr(b[44:60], dst.Addr())
}

func putAddr(b []byte, a netip.Addr) {
	if a.Is4() {
		a4 := a.As4()
		copy(b, a4[:])
	} else if a.Is6() {
		a16 := a.As16()
		copy(b, a16[:])
	}
}

// diagMsg is an inet_diag_msg.
type diagMsg [diagMsgLen]byte

func (m *diagMsg) state() uint8        { return m[1] }
func (m *diagMsg) src() netip.AddrPort { return m.endpoint(4, 8) }
func (m *diagMsg) dst() netip.AddrPort { return m.endpoint(6, 24) }

func (m *diagMsg) endpoint(port, addr int) netip.AddrPort {
	var a netip.Addr
	if m[0] == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(m[addr:]))
	} else {
		a = netip.AddrFrom16([16]byte(m[addr:])).Unmap()
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(m[port:]))
}

// OpenDiagFile opens a sock_diag socket in the network namespace of the calling thread for another process, which passes
// it to DiagFromFile.
func OpenDiagFile() (*os.File, error) {
	fd, err := openDiagSocket()
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "sock_diag"), nil
}
