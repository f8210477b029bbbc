package route

import (
	"errors"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/flow"
)

// maxHostPorts is how many UDP ports of the host one socket of a program reaches at a time. Each has a socket of its own.
const maxHostPorts = 64

// hostLink carries the datagrams of one socket of a program to UDP services on the loopback addresses of the host. Each
// service has a connected socket: the kernel then takes datagrams only from there, and reports if nobody listens.
type hostLink struct {
	l    *relay.Loop
	sink func([]flow.Packet)

	mu    sync.Mutex
	ports map[uint16]*hostPort // nil: closed
	past  relay.LinkStats      // of sockets that are closed
}

// hostPort is the socket for one service.
type hostPort struct {
	link   relay.PacketLink
	errors interface{ Unreachable() uint64 } // of link; not nil
	to     netip.AddrPort                    // the service
}

func newHostLink(l *relay.Loop, sink func([]flow.Packet)) *hostLink {
	return &hostLink{l: l, sink: sink, ports: make(map[uint16]*hostPort)}
}

// unsentError is the error of Send about datagrams to ports on which nobody listens.
type unsentError struct{ pkts []flow.Packet }

// Error implements error.
func (*unsentError) Error() string { return "no service of the host listens on this port" }

// Send implements relay.PacketLink. The error may also be an *unsentError, after which the link works as before.
func (h *hostLink) Send(pkts []flow.Packet) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ports == nil {
		return 0, relay.ErrClosed
	}
	var unsent []flow.Packet
	for i := 0; i < len(pkts); {
		j := i + 1
		for j < len(pkts) && pkts[j].Dst == pkts[i].Dst {
			j++
		}
		sent, refused := h.sendTo(pkts[i:j])
		if n += sent; refused {
			unsent = append(unsent, pkts[i:j]...)
		}
		i = j
	}
	if unsent != nil {
		return n, &unsentError{unsent}
	}
	return n, nil
}

// sendTo sends datagrams with the same destination. refused means that nobody listens there.
func (h *hostLink) sendTo(pkts []flow.Packet) (n int, refused bool) {
	meant := pkts[0].Dst
	at := loopbacks(meant.Addr())
	p := h.ports[meant.Port()]
	if p != nil && p.errors.Unreachable() > 0 { // the service has ended, or listens at the other address
		if p.to.Addr() == at[0] {
			at[0], at[1] = at[1], at[0]
		}
		h.drop(meant.Port())
		p = nil
	}
	if p == nil {
		var err error
		if p, err = h.open(at, meant, pkts[0].Payload); err != nil {
			if nobodyListens(err) {
				return 0, true
			}
			h.past.Unsendable += uint64(len(pkts))
			return 0, false
		}
		h.past.Sent++
		h.past.SentBytes += uint64(len(pkts[0].Payload))
		n, pkts = 1, pkts[1:]
	}
	if len(pkts) == 0 {
		return n, false
	}
	for i := range pkts {
		pkts[i].Dst = p.to
	}
	sent, _ := p.link.Send(pkts) // an error means that the loop has ended
	for i := range pkts {
		pkts[i].Dst = meant
	}
	return n + sent, false
}

// open makes the socket for a service, and sends the first datagram to find out at which address it listens.
func (h *hostLink) open(at [2]netip.Addr, meant netip.AddrPort, first []byte) (*hostPort, error) {
	if len(h.ports) >= maxHostPorts {
		for port := range h.ports { // any of them: its next datagram gets a new socket
			h.drop(port)
			break
		}
	}
	var err error
	for _, a := range at {
		to := netip.AddrPortFrom(a, meant.Port())
		var fd int
		if fd, err = firstDatagram(to, first); err != nil {
			if nobodyListens(err) {
				continue
			}
			return nil, err
		}
		p := &hostPort{to: to}
		p.link, err = h.l.OpenPackets(fd, nil, func(pkts []flow.Packet) {
			for i := range pkts {
				pkts[i].Src = meant
			}
			h.sink(pkts)
		}, nil)
		if err != nil {
			return nil, err
		}
		p.errors = p.link.(interface{ Unreachable() uint64 })
		h.ports[meant.Port()] = p
		return p, nil
	}
	return nil, err
}

// firstDatagram returns a socket that is connected to a loopback address, from which one datagram was sent. On loopback
// the kernel usually reports at once that nobody listens.
func firstDatagram(to netip.AddrPort, b []byte) (fd int, err error) {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: loopback4.As4(), Port: int(to.Port())})
	if to.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Addr: loopback6.As16(), Port: int(to.Port())}
	}
	if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP); err != nil {
		return -1, err
	}
	if err = unix.Connect(fd, sa); err == nil {
		_, err = unix.SendmsgN(fd, b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}
	if err == nil {
		var errno int
		if errno, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
			err = unix.Errno(errno)
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// drop closes the socket for a port. h.mu is held.
func (h *hostLink) drop(port uint16) {
	p := h.ports[port]
	delete(h.ports, port)
	s := p.link.Stats()
	s.Overflowed += p.link.Overflowed()
	count.Add(&h.past, &s)
	_ = p.link.Close() // nothing can be done about an error
}

// Close implements relay.PacketLink.
func (h *hostLink) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for port := range h.ports {
		h.drop(port)
	}
	h.ports = nil
	return nil
}

// Stats implements relay.PacketLink.
func (h *hostLink) Stats() relay.LinkStats {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.past
	for _, p := range h.ports {
		one := p.link.Stats()
		count.Add(&s, &one)
	}
	s.Overflowed = 0 // Overflowed returns it
	return s
}

// Overflowed implements relay.PacketLink.
func (h *hostLink) Overflowed() (n uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n = h.past.Overflowed
	for _, p := range h.ports {
		n += p.link.Overflowed()
	}
	return n
}

// unsent handles an error of Send. The caller holds udp.mu.
func (r *shard) unsent(w flow.PacketWriter, t *try, err error) {
	var nobody *unsentError
	if errors.As(err, &nobody) {
		r.refuse(w, nobody.pkts, flow.RefusePort)
		return
	}
	r.inbox.post(event{kind: evClosed, t: t, err: err})
}
