package publish

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// udpIdle is the time without traffic after which a sender loses its socket inside. RFC 4787 (REQ-5) requires at least
// two minutes.
const udpIdle = 2 * time.Minute

// maxFirst is the largest datagram that is kept until the program's address is known. Datagrams over the usual MTU are
// rare.
const maxFirst = 1500

// senders contains all senders to one published port.
type senders struct {
	p   *Publisher
	out *net.UDPConn
	s   Spec

	mu  sync.Mutex
	all map[senderKey]*sender
}

// senderKey is the address of a sender, and the address to which it sends. Answers come from the latter.
type senderKey struct {
	from netip.AddrPort
	to   string // the control message that names it; empty if the port is published at one address
}

// sender has its own socket inside, so that the program can distinguish senders.
type sender struct {
	key senderKey

	mu     sync.Mutex
	in     *net.UDPConn
	target int    // the index of in's target
	first  []byte // not nil: the program has not answered yet, and this is sent again if nobody listens at in's target
}

// serveUDP carries datagrams until Close.
func (p *Publisher) serveUDP(out *net.UDPConn, s Spec) {
	all := &senders{p: p, out: out, s: s, all: make(map[senderKey]*sender)}
	stop := afterFunc(p.ctx, all.end)
	defer stop()
	b, oob := make([]byte, 64<<10), make([]byte, 128)
	for {
		n, oobn, _, from, err := out.ReadMsgUDPAddrPort(b, oob)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // an ICMP error about an answer; the next call reads a datagram
			continue
		}
		if err := all.take(b[:n], senderKey{from, destination(oob[:oobn])}); err != nil {
			p.dropped.Add(1)
			p.cfg.Log.Debug("a datagram to a published port was dropped", "port", s.String(), "from", from, "err", err)
			continue
		}
		p.datagrams.Add(1)
	}
}

var errTooMany = fmt.Errorf("more than %d senders", maxFlows)

// take passes one datagram to the program.
func (a *senders) take(b []byte, key senderKey) error {
	a.mu.Lock()
	s := a.all[key]
	if s == nil {
		if err := a.mayAdd(); err != nil {
			a.mu.Unlock()
			return err
		}
		in, target, err := a.p.dialUDP(a.s.Port, 0)
		if err != nil {
			a.mu.Unlock()
			return err
		}
		s = &sender{key: key, in: in, target: target, first: make([]byte, 0, 1)}
		a.all[key] = s
		a.p.open.Add(1)
		a.p.wg.Go(func() { a.answers(s) })
	}
	a.mu.Unlock()
	return s.send(b)
}

// mayAdd returns an error if no further sender can be added. a.mu is held.
func (a *senders) mayAdd() error {
	if len(a.all) >= maxFlows {
		return errTooMany
	}
	return a.p.ctx.Err() // end does not see it any more
}

// send passes b to the program.
func (s *sender) send(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first != nil && len(b) <= maxFirst {
		s.first = append(s.first[:0], b...)
	}
	_ = s.in.SetReadDeadline(time.Now().Add(udpIdle))
	_, err := s.in.Write(b)
	if errors.Is(err, syscall.ECONNREFUSED) { // an error about the previous datagram, not this one
		_, err = s.in.Write(b)
	}
	return err
}

// answers passes the program's answers to a sender until the sender is idle.
func (a *senders) answers(s *sender) {
	defer func() {
		a.mu.Lock()
		delete(a.all, s.key)
		a.mu.Unlock()
		a.p.open.Add(-1)
		s.mu.Lock()
		_ = s.in.Close()
		s.mu.Unlock()
	}()
	b := make([]byte, 64<<10)
	for {
		s.mu.Lock()
		in := s.in
		s.mu.Unlock()
		n, err := in.Read(b)
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return
		case errors.Is(err, syscall.ECONNREFUSED):
			a.elsewhere(s)
			continue
		case err != nil:
			continue
		}
		s.mu.Lock()
		s.first = nil
		_ = in.SetReadDeadline(time.Now().Add(udpIdle))
		s.mu.Unlock()
		if _, _, err := a.out.WriteMsgUDPAddrPort(b[:n], []byte(s.key.to), s.key.from); err != nil {
			a.p.dropped.Add(1)
			continue
		}
		a.p.datagrams.Add(1)
	}
}

// elsewhere makes s try the next target if nothing listens at this one and the program has not answered before. The
// last datagram is sent again there. After the last target, the next datagram goes to the first one.
func (a *senders) elsewhere(s *sender) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first == nil || len(a.p.cfg.Targets) < 2 {
		return
	}
	in, target, err := a.p.dialUDP(a.s.Port, (s.target+1)%len(a.p.cfg.Targets))
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.p.ctx.Err() != nil { // end has closed the sockets
		_ = in.Close()
		return
	}
	_ = in.SetReadDeadline(time.Now().Add(udpIdle))
	_ = s.in.Close()
	again := target > s.target
	s.in, s.target = in, target
	if again && len(s.first) > 0 {
		_, _ = in.Write(s.first)
	}
}

// end closes the senders' sockets, after the Publisher's context has ended.
func (a *senders) end() {
	a.mu.Lock()
	all := make([]*sender, 0, len(a.all))
	for _, s := range a.all {
		all = append(all, s)
	}
	a.mu.Unlock()
	for _, s := range all {
		s.mu.Lock()
		_ = s.in.Close()
		s.mu.Unlock()
	}
}

// dialUDP creates a socket that is connected to the program's port at the target with this index, or at the next one
// that exists in the namespace. Only an answer or an error shows later whether the program listens there.
func (p *Publisher) dialUDP(port uint16, from int) (in *net.UDPConn, target int, err error) {
	for i := range p.cfg.Targets {
		target = (from + i) % len(p.cfg.Targets)
		var c net.Conn
		if c, err = p.connectTo(p.cfg.Targets[target], port, unix.SOCK_DGRAM); err == nil {
			return c.(*net.UDPConn), target, nil
		}
	}
	return nil, 0, err
}

// askDestination makes the kernel add a control message to each datagram that tells to which of our addresses it was
// sent (ip(7), IP_PKTINFO). It is called before the socket is bound.
func askDestination(network, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		if network == "udp4" {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
	})
	if err == nil {
		err = failed
	}
	return err
}

// destination turns the control message of a datagram into that of its answers. It leaves the interface to the routing
// table unless the address is valid only on one interface.
func destination(oob []byte) string {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		return ""
	}
	m := msgs[0]
	switch {
	case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
		var local [4]byte
		copy(local[:], m.Data[4:8])
		return string(unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: local}))
	case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
		info := unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])}
		if netip.AddrFrom16(info.Addr).IsLinkLocalUnicast() {
			info.Ifindex = binary.NativeEndian.Uint32(m.Data[16:20])
		}
		return string(unix.PktInfo6(&info))
	}
	return ""
}
