package relay

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Codec adds and removes the header of each datagram: the SOCKS UDP header (RFC 1928, section 7). Its methods are
// called concurrently from the frame reader and from the loop, so it must have no state that changes.
type Codec interface {
	// AppendHeader appends the header of a datagram to dst. If it returns b unchanged, there is no header for dst,
	// and the datagram is dropped.
	AppendHeader(b []byte, dst netip.AddrPort) []byte
	// ParseHeader returns the source that the header names, and the header's length. b is whatever the relay sent.
	// After an error the datagram is dropped and counted; the error should be a fixed value that is made once.
	ParseHeader(b []byte) (src netip.AddrPort, n int, err error)
}

// PacketLink is a UDP socket of an upstream.
type PacketLink interface {
	// Send sends datagrams to their Dst. It never blocks: what cannot be sent is dropped and counted. n is the number
	// that the kernel accepted. The error is ErrClosed or nil. One goroutine at a time may call Send; Close may be
	// called meanwhile.
	Send([]flow.Packet) (n int, err error)
	// Close releases the socket. A sink call in progress ends after it; no other begins once the loop has noticed. It
	// may be called twice and from any goroutine.
	Close() error
	Stats() LinkStats // may be called from any goroutine
	// Overflowed is how many datagrams the kernel has dropped because the socket's receive buffer was full. It is a system
	// call. It may be called from any goroutine, and returns 0 after the end.
	Overflowed() uint64
}

// LinkCounters is the table of what links count, in datagrams: see package count. Bytes are payload, without the header.
type LinkCounters[T any] struct {
	Sent          T `metric:"upstream_datagrams_total" label:"direction=up" help:"Datagrams by upstream; up: from programs."`
	Received      T `metric:"upstream_datagrams_total" label:"direction=down"`
	SentBytes     T `metric:"upstream_bytes_total" label:"proto=udp,direction=up"`
	ReceivedBytes T `metric:"upstream_bytes_total" label:"proto=udp,direction=down"`
	// Not sent: over what the encapsulation allows (DESIGN.md 6).
	TooLarge T `metric:"upstream_datagrams_dropped_total" label:"reason=too_large" lost:"datagrams too large for SOCKS" help:"Datagrams lost."`
	// Not sent: the socket's buffer was full.
	Full T `metric:"upstream_datagrams_dropped_total" label:"reason=send_buffer_full" lost:"datagrams sent faster than the host took them"`
	// Not sent: no header, wrong family, or refused by the kernel.
	Unsendable T `metric:"upstream_datagrams_dropped_total" label:"reason=unsendable" lost:"datagrams that could not be sent"`
	// Received and dropped: bad header.
	Malformed T `metric:"upstream_datagrams_dropped_total" label:"reason=bad_header" lost:"malformed datagrams of a proxy"`
	// Dropped by the kernel, because the socket's receive buffer was full: PacketLink.Overflowed, added by whoever sums up.
	Overflowed  T `metric:"upstream_datagrams_dropped_total" label:"reason=receive_buffer_full" lost:"datagrams that came too fast"`
	Unreachable T `metric:"upstream_icmp_errors_total" help:"ICMP errors about datagrams to upstreams: they are transient."`
}

// LinkStats is a snapshot of one link, or of several.
type LinkStats = LinkCounters[uint64]

// The longest UDP payload: 65,535 less the UDP header and, on IPv4, less the IP header.
const (
	maxUDP4 = 65507
	maxUDP6 = 65527
)

// link implements PacketLink. The loop owns fd and closes it; mu keeps it open during Send.
type link struct {
	loop.Node
	l      *Loop
	codec  Codec
	sink   func([]flow.Packet)
	closed func(error)
	v6     bool // socket family
	max    int  // longest datagram with header, when connected

	mu   sync.Mutex
	fd   int
	shut bool
	seg  int // the largest size for which UDP_SEGMENT is tried; guarded by mu

	st   LinkCounters[atomic.Uint64]
	over bool // belongs to the loop
}

// OpenPackets makes a link of fd, a non-blocking UDP socket, and takes ownership of it, even on error. With a codec
// the socket is connected to the SOCKS relay, so the kernel drops datagrams of other senders. Without one it is not
// connected: datagrams go unchanged to their Dst, and Src is their sender.
//
// sink receives datagrams on the loop, in bursts. The packets and their bytes are valid only during the call. Src is
// set, Dst is not. closed, if not nil, is called once, on the loop, if the socket fails for good or the loop ends
// (ErrClosed), but not after Close.
func (l *Loop) OpenPackets(fd int, codec Codec, sink func([]flow.Packet), closed func(error)) (PacketLink, error) {
	k := &link{l: l, fd: fd, codec: codec, sink: sink, closed: closed, max: maxUDP4, seg: maxUDP4}
	k.Init(k)
	family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("cannot open a packet link: %w", err)
	}
	k.v6 = family == unix.AF_INET6
	if k.v6 && codec != nil {
		if peer, err := unix.Getpeername(fd); err == nil {
			if a, ok := peer.(*unix.SockaddrInet6); ok && !netip.AddrFrom16(a.Addr).Is4In6() {
				k.max = maxUDP6
			}
		}
	}
	// Without GRO (Linux before 5.0) datagrams arrive one by one. A burst of a swarm overruns the default buffer of
	// 208 KiB.
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20)
	if !l.Join(&k.Node) {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("cannot open a packet link: %w", ErrClosed)
	}
	l.Note(&k.Node, opened)
	return k, nil
}

// Close implements PacketLink.
func (k *link) Close() error {
	k.mu.Lock()
	k.shut = true
	k.mu.Unlock()
	k.l.Note(&k.Node, ended)
	return nil
}

// Stats implements PacketLink.
func (k *link) Stats() (s LinkStats) {
	count.Add(&s, &k.st)
	return s
}

// Unreachable returns how many ICMP errors came. It costs less than Stats.
func (k *link) Unreachable() uint64 { return k.st.Unreachable.Load() }

// Overflowed implements PacketLink.
func (k *link) Overflowed() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fd < 0 {
		return 0
	}
	return dropsOf(k.fd)
}

// Turn implements loop.Task.
func (k *link) Turn() (again bool) {
	switch {
	case k.over:
		return false
	case k.Got&ended != 0:
		k.finish(nil)
		return false
	case k.Got&opened != 0:
		k.Got &^= opened
		if err := k.l.Watch(&k.Node, k.fd, unix.EPOLLIN); err != nil {
			k.finish(fmt.Errorf("cannot watch a packet link: %w", err))
			return false
		}
	}
	if k.Got&sockIn == 0 {
		return false
	}
	return k.receive()
}

// Shutdown implements loop.Task.
func (k *link) Shutdown() { k.finish(ErrClosed) }

// finish closes the socket and calls closed, unless Close was called.
func (k *link) finish(err error) {
	if k.over {
		return
	}
	k.over = true
	k.l.Forget(&k.Node)
	k.mu.Lock()
	tell := !k.shut
	k.shut = true
	_ = loop.Close(k.fd)
	k.fd = -1
	k.mu.Unlock()
	k.l.Leave(&k.Node)
	if tell && k.closed != nil {
		k.closed(err)
	}
	k.sink, k.closed = nil, nil
}
