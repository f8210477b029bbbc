package relay

import (
	"net/netip"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
)

const (
	txVec   = 64    // maximum number of messages for one sendmmsg
	txIov   = 512   // header and payload of 256 datagrams
	maxRun  = 64    // UDP_MAX_SEGMENTS before Linux 6.6; 128 since
	maxSend = 65000 // maximum bytes of one run; with the headers it stays below 65,535
)

// txBatch is the content of one sendmmsg. It is pooled, so a link that does not send owns none.
type txBatch struct {
	msgs  [txVec]unix.Mmsghdr
	iov   [txIov]unix.Iovec
	names [txVec]unix.RawSockaddrInet6
	ctl   [txVec][ctlLen]byte
	run   [txVec]txRun
	head  []byte // headers; the iovecs point into it
	nmsg  int
	niov  int
	gso   bool // a message may be a run of several datagrams
}

// txRun is one message: count datagrams of size bytes, of which the last may be shorter.
type txRun struct {
	size, count    int
	bytes, payload int            // with and without headers
	iov            int            // index of the first iovec
	dst            netip.AddrPort // when not connected
	closed         bool           // accepts no more datagrams
}

var txPool = sync.Pool{New: func() any {
	b := &txBatch{head: make([]byte, 0, txIov/2*22)}
	for i := range b.ctl {
		c := (*unix.Cmsghdr)(unsafe.Pointer(&b.ctl[i][0]))
		c.Level, c.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
		c.SetLen(unix.CmsgLen(2))
	}
	return b
}}

// Send implements PacketLink.
func (k *link) Send(ps []flow.Packet) (sent int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.shut {
		return 0, ErrClosed
	}
	b := txPool.Get().(*txBatch)
	b.nmsg, b.niov, b.head, b.gso = 0, 0, b.head[:0], !k.l.noGSO.Load()
	for i := range ps {
		if b.nmsg == txVec || b.niov+2 > txIov {
			sent += k.flush(b)
		}
		k.put(b, &ps[i])
	}
	sent += k.flush(b)
	txPool.Put(b)
	return sent, nil
}

// put adds a datagram to the batch, which has room for it: to the last run if it fits there.
func (k *link) put(b *txBatch, p *flow.Packet) {
	at := len(b.head)
	limit := k.max
	if k.codec != nil {
		b.head = k.codec.AppendHeader(b.head, p.Dst)
		if len(b.head) <= at {
			b.head = b.head[:at]
			k.st.Unsendable.Add(1)
			return
		}
	} else {
		is4 := p.Dst.Addr().Is4() || p.Dst.Addr().Is4In6()
		if !p.Dst.IsValid() || !is4 && !k.v6 {
			k.st.Unsendable.Add(1)
			return
		}
		if !is4 {
			limit = maxUDP6
		}
	}
	h := b.head[at:]
	size := len(h) + len(p.Payload)
	if size > limit {
		b.head = b.head[:at]
		k.st.TooLarge.Add(1)
		return
	}
	r := k.runFor(b, p.Dst, size)
	r.count++
	r.bytes += size
	r.payload += len(p.Payload)
	r.closed = size < r.size
	b.addIov(h)
	b.addIov(p.Payload)
}

// runFor returns the last run if it can take a datagram of size to dst, or a new one.
func (k *link) runFor(b *txBatch, dst netip.AddrPort, size int) *txRun {
	if b.nmsg > 0 && b.gso {
		r := &b.run[b.nmsg-1]
		if !r.closed && size > 0 && size <= r.size && r.size <= k.seg && r.count < maxRun &&
			r.bytes+size <= maxSend && (k.codec != nil || r.dst == dst) {
			return r
		}
	}
	r := &b.run[b.nmsg]
	*r = txRun{size: size, iov: b.niov, dst: dst}
	b.nmsg++
	return r
}

func (b *txBatch) addIov(p []byte) {
	if len(p) == 0 {
		return
	}
	b.iov[b.niov].Base = &p[0]
	b.iov[b.niov].SetLen(len(p))
	b.niov++
}

// flush sends the batch and empties it. It returns how many datagrams the kernel accepted.
func (k *link) flush(b *txBatch) (sent int) {
	if b.nmsg == 0 {
		return 0
	}
	for i := range b.nmsg {
		k.message(b, i)
	}
	var bytes int
	tries := 0 // of message i
	for i := 0; i < b.nmsg; {
		n, e := sendmmsg(k.fd, b.msgs[i:b.nmsg])
		for range n {
			sent += b.run[i].count
			bytes += b.run[i].payload
			i++
			tries = 0
		}
		if e == 0 {
			continue
		}
		r := &b.run[i]
		switch {
		case e == unix.EAGAIN: // the buffer is full, which holds for the others too
			for ; i < b.nmsg; i++ {
				k.st.Full.Add(uint64(b.run[i].count))
			}
			continue
		case e == unix.ECONNREFUSED && tries < 3:
			// This is the ICMP error for an earlier datagram; this one was not tried.
			k.st.Unreachable.Add(1)
			tries++
			continue
		case r.count > 1 && (e == unix.EINVAL || e == unix.EMSGSIZE || e == unix.EIO):
			// UDP_SEGMENT does not work for this size: it exceeds the path's MTU (EINVAL, EMSGSIZE), or there is no
			// checksum offload (EIO).
			k.seg = r.size - 1
			if e == unix.EIO {
				k.seg = 0
			}
			n, by := k.sendSingly(b, i)
			sent += n
			bytes += by
		case e == unix.EMSGSIZE:
			k.st.TooLarge.Add(1)
		default:
			k.st.Unsendable.Add(uint64(r.count))
		}
		i++
		tries = 0
	}
	k.st.Sent.Add(uint64(sent))
	k.st.SentBytes.Add(uint64(bytes))
	b.nmsg, b.niov, b.head = 0, 0, b.head[:0]
	return sent
}

// message fills in message i from its run.
func (k *link) message(b *txBatch, i int) {
	r := &b.run[i]
	h := &b.msgs[i].Hdr
	end := b.niov
	if i+1 < b.nmsg {
		end = b.run[i+1].iov
	}
	*h = unix.Msghdr{}
	if end > r.iov {
		h.Iov = &b.iov[r.iov]
		h.SetIovlen(end - r.iov)
	}
	if k.codec == nil {
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Namelen = putSockaddr(&b.names[i], r.dst, k.v6)
	}
	if r.count > 1 {
		*(*uint16)(unsafe.Pointer(&b.ctl[i][unix.SizeofCmsghdr])) = uint16(r.size)
		h.Control = &b.ctl[i][0]
		h.SetControllen(ctlLen)
	}
}

// sendSingly sends run i as count messages.
func (k *link) sendSingly(b *txBatch, i int) (sent, bytes int) {
	r := &b.run[i]
	m := b.msgs[i : i+1]
	h := &m[0].Hdr
	h.Control = nil
	h.SetControllen(0)
	at, left := r.iov, r.bytes
	for range r.count {
		size := min(r.size, left)
		left -= size
		n := 0 // iovecs of this datagram: header and payload, or one of the two
		for got := 0; got < size; n++ {
			got += int(b.iov[at+n].Len)
		}
		h.Iov = &b.iov[at]
		h.SetIovlen(n)
		payload := size
		if k.codec != nil {
			payload -= int(b.iov[at].Len)
		}
		at += n
		_, e := sendmmsg(k.fd, m)
		switch e {
		case 0:
			sent++
			bytes += payload
		case unix.EAGAIN:
			k.st.Full.Add(1)
		case unix.EMSGSIZE:
			k.st.TooLarge.Add(1)
		default:
			k.st.Unsendable.Add(1)
		}
	}
	return sent, bytes
}

func sendmmsg(fd int, m []unix.Mmsghdr) (int, unix.Errno) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), 0
	}
}

// putSockaddr writes dst for a socket of the given family and returns its length. A dual-stack socket needs
// IPv4-mapped addresses.
func putSockaddr(sa *unix.RawSockaddrInet6, dst netip.AddrPort, v6 bool) uint32 {
	if v6 {
		*sa = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: swap16(dst.Port()), Addr: dst.Addr().As16()}
		return unix.SizeofSockaddrInet6
	}
	*(*unix.RawSockaddrInet4)(unsafe.Pointer(sa)) = unix.RawSockaddrInet4{
		Family: unix.AF_INET, Port: swap16(dst.Port()), Addr: dst.Addr().Unmap().As4()}
	return unix.SizeofSockaddrInet4
}
