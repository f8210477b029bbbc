package relay

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
)

const (
	recvVec     = 32      // maximum number of messages for one recvmmsg; with UDP_GRO each may contain 64 datagrams
	recvBuf     = 1 << 16 // length of the longest datagram and the longest GRO run
	recvTurn    = 256     // approximate number of datagrams for one turn, which turnBytes also limits
	recvPackets = 256     // datagrams for one sink call
	ctlLen      = 24      // CMSG_SPACE of an int
)

// recvBuffers is shared by all links of a loop, so a waiting link owns none. It is 2 MiB of address space; the kernel
// touches only as many pages as the datagrams need.
type recvBuffers struct {
	data  []byte
	msgs  [recvVec]unix.Mmsghdr
	iov   [recvVec]unix.Iovec
	names [recvVec]unix.RawSockaddrInet6 // large enough for both families
	ctl   [recvVec][ctlLen]byte
	used  int // headers that the last call may have changed
	vec   int // messages for the next call: fewer if they are large, so that a turn keeps to its budget
	pkts  []flow.Packet
}

func newRecvBuffers() *recvBuffers {
	b := &recvBuffers{data: make([]byte, recvVec*recvBuf), used: recvVec, vec: recvVec, pkts: make([]flow.Packet, 0, recvPackets)}
	for i := range b.msgs {
		b.iov[i].Base = &b.data[i*recvBuf]
		b.iov[i].SetLen(recvBuf)
		h := &b.msgs[i].Hdr
		h.Iov = &b.iov[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Control = &b.ctl[i][0]
	}
	return b
}

// recv receives up to b.vec messages.
func (b *recvBuffers) recv(fd int) (int, unix.Errno) {
	for i := range b.used {
		h := &b.msgs[i].Hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(ctlLen)
	}
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])), uintptr(b.vec),
			unix.MSG_DONTWAIT, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			b.used = 1 // the kernel may have changed the first
			return 0, e
		}
		b.used = min(int(n)+1, recvVec)
		return int(n), 0
	}
}

// segment returns the size of the datagrams that GRO joined in message i, or 0.
func (b *recvBuffers) segment(i int) int {
	h := &b.msgs[i].Hdr
	if int(h.Controllen) < unix.SizeofCmsghdr+4 {
		return 0
	}
	c := (*unix.Cmsghdr)(unsafe.Pointer(&b.ctl[i][0]))
	if c.Level != unix.IPPROTO_UDP || c.Type != unix.UDP_GRO {
		return 0
	}
	return int(int32(binary.NativeEndian.Uint32(b.ctl[i][unix.SizeofCmsghdr:])))
}

// source returns the sender of message i. IPv4-mapped addresses are unmapped.
func (b *recvBuffers) source(i int) netip.AddrPort {
	sa := &b.names[i]
	switch sa.Family {
	case unix.AF_INET:
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(sa4.Addr), swap16(sa4.Port))
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), swap16(sa.Port))
	}
	return netip.AddrPort{}
}

// swap16 converts a port from network order, as in sockaddr, to a number, and back.
func swap16(p uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], p)
	return binary.BigEndian.Uint16(b[:])
}

// receive passes received datagrams to sink, for one turn.
func (k *link) receive() (again bool) {
	if k.l.recv == nil {
		k.l.recv = newRecvBuffers()
	}
	b := k.l.recv
	for datagrams, bytes := 0, 0; datagrams < recvTurn && bytes < turnBytes; {
		asked := b.vec
		n, e := b.recv(k.fd)
		if e == unix.EAGAIN {
			k.Got &^= sockIn | sockHup | sockErr
			return false
		}
		if e != 0 {
			if !transient(e) {
				k.finish(e)
				return false
			}
			k.st.Unreachable.Add(1)
			datagrams++
			continue
		}
		d, size := k.deliver(b, n)
		datagrams += d
		bytes += size
		if size > turnBytes {
			b.vec = max(b.vec/2, 2)
		} else if size < turnBytes/4 {
			b.vec = min(b.vec*2, recvVec)
		}
		// A short count means that the socket was empty, and that the next datagram causes a new edge. But an ICMP
		// error may have caused the short count; then only EAGAIN is proof.
		if n < asked && k.Got&sockErr == 0 {
			k.Got &^= sockIn | sockHup
			return false
		}
	}
	return true
}

// deliver splits n messages into datagrams and passes them to sink. It returns their number and total size.
func (k *link) deliver(b *recvBuffers, n int) (datagrams, size int) {
	var bad, bytes, count uint64
	b.pkts = b.pkts[:0]
	for i := range n {
		m := b.data[i*recvBuf : i*recvBuf+int(b.msgs[i].Len)]
		size += len(m)
		seg := b.segment(i)
		if seg <= 0 || seg > len(m) {
			seg = len(m)
		}
		var from netip.AddrPort
		if k.codec == nil {
			from = b.source(i)
		}
		for first := true; first || len(m) > 0; first = false { // an empty datagram counts, too
			d := m[:min(seg, len(m))]
			m = m[len(d):]
			src := from
			if k.codec != nil {
				s, h, err := k.codec.ParseHeader(d)
				if err != nil || h < 0 || h > len(d) {
					bad++
					continue
				}
				src, d = s, d[h:]
			}
			if !src.IsValid() {
				bad++
				continue
			}
			count++
			bytes += uint64(len(d))
			b.pkts = append(b.pkts, flow.Packet{Src: src, Payload: d})
			if len(b.pkts) == recvPackets {
				k.hand(b, bytes)
				bytes = 0
			}
		}
	}
	if bad > 0 {
		k.st.Malformed.Add(bad)
	}
	if len(b.pkts) > 0 {
		k.hand(b, bytes)
	}
	return int(bad + count), size
}

// hand passes the collected datagrams to the sink. bytes is their size. They are counted first, so that a sink that
// sees a datagram also sees it counted.
func (k *link) hand(b *recvBuffers, bytes uint64) {
	k.st.Received.Add(uint64(len(b.pkts)))
	k.st.ReceivedBytes.Add(bytes)
	k.sink(b.pkts)
	b.pkts = b.pkts[:0]
}

// transient reports whether e is an ICMP error that a connected socket reports, or a shortage in the kernel.
func transient(e unix.Errno) bool {
	switch e {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET, unix.ENOPROTOOPT,
		unix.EPROTO, unix.EACCES, unix.EPERM, unix.EMSGSIZE, unix.EOPNOTSUPP, unix.ENETDOWN, unix.ENOBUFS, unix.ENOMEM:
		return true
	}
	return false
}
