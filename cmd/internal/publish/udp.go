package publish

import (
	"container/list"
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

	mu         sync.Mutex
	all        map[senderKey]*sender
	unanswered *list.List // of *sender: those whom the program has not answered, in the order of their last datagrams
	last       int        // index of the target at which the program answered last
}

// senderKey is the address of a sender, and the address to which it sends. Answers come from the latter.
type senderKey struct {
	from netip.AddrPort
	to   string // the control message that names it; empty if the port is published at one address
}

// sender has its own socket inside, so that the program can distinguish senders.
type sender struct {
	key senderKey
	at  *list.Element // in unanswered, guarded by the mutex of senders; nil: the program has answered

	mu     sync.Mutex
	in     *net.UDPConn
	target int    // the index of in's target
	tried  int    // how many targets were tried in vain since the last datagram
	first  []byte // not nil: the program has not answered yet, and this is sent again if nobody listens at in's target
}

func newSenders(p *Publisher, out *net.UDPConn, s Spec) *senders {
	return &senders{p: p, out: out, s: s, all: make(map[senderKey]*sender), unanswered: list.New()}
}

// serveUDP carries datagrams until Close.
func (p *Publisher) serveUDP(out *net.UDPConn, s Spec) {
	all := newSenders(p, out, s)
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
	var gone *sender
	if s == nil {
		var err error
		if s, gone, err = a.add(key); err != nil {
			a.mu.Unlock()
			return err
		}
	} else if s.at != nil {
		a.unanswered.MoveToBack(s.at)
	}
	a.mu.Unlock()
	gone.close()
	return s.send(b)
}

// add returns a new sender. If there are too many, it forgets the one that was silent longest and returns it as gone; the
// caller closes gone after it has released a.mu. a.mu is held.
func (a *senders) add(key senderKey) (s, gone *sender, err error) {
	if err := a.p.ctx.Err(); err != nil { // end has run, and would not close it
		return nil, nil, err
	}
	full, oldest := len(a.all) >= maxFlows, a.unanswered.Front()
	if full && oldest == nil {
		return nil, nil, errTooMany
	}
	in, target, err := a.p.dialUDP(a.s.Port, a.last)
	if err != nil {
		return nil, nil, err
	}
	if full { // anybody can send from many addresses, so only those whom the program has answered keep their place
		gone = oldest.Value.(*sender)
		a.remove(gone)
	}
	s = &sender{key: key, in: in, target: target, first: make([]byte, 0, 1)}
	s.at = a.unanswered.PushBack(s)
	a.all[key] = s
	a.p.open.Add(1)
	a.p.wg.Go(func() { a.answers(s) })
	return s, gone, nil
}

// remove forgets s. It may be called twice. a.mu is held.
func (a *senders) remove(s *sender) {
	if a.all[s.key] == s {
		delete(a.all, s.key)
	}
	a.answered(s)
}

// answered removes s from the list of those whom the program has not answered. a.mu is held.
func (a *senders) answered(s *sender) {
	if s.at != nil {
		a.unanswered.Remove(s.at)
		s.at = nil
	}
}

// close closes the socket of s, which ends its goroutine. s may be nil.
func (s *sender) close() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.in.Close()
}

// send passes b to the program.
func (s *sender) send(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tried = 0
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
		a.remove(s)
		a.mu.Unlock()
		a.p.open.Add(-1)
		s.close()
	}()
	for {
		s.mu.Lock()
		in := s.in
		s.mu.Unlock()
		err := a.answer(s, in)
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return
		case errors.Is(err, syscall.ECONNREFUSED):
			a.elsewhere(s)
		}
	}
}

// answerBuffers has buffers for the largest datagrams. A sender takes one only while it has a datagram to pass on.
var answerBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// answer waits for one answer of the program and passes it to the sender. It returns errors of in. What cannot be passed to
// the sender is counted as dropped.
func (a *senders) answer(s *sender, in *net.UDPConn) error {
	raw, err := in.SyscallConn()
	if err != nil {
		return err
	}
	var b *[64 << 10]byte
	var n int
	var failed error
	err = raw.Read(func(fd uintptr) (done bool) {
		b = answerBuffers.Get().(*[64 << 10]byte)
		for {
			if n, failed = unix.Read(int(fd), b[:]); failed != unix.EINTR {
				break
			}
		}
		if failed == nil {
			return true
		}
		answerBuffers.Put(b)
		return failed != unix.EAGAIN
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	defer answerBuffers.Put(b)
	a.heard(s, in)
	if _, _, err := a.out.WriteMsgUDPAddrPort(b[:n], []byte(s.key.to), s.key.from); err != nil {
		a.p.dropped.Add(1)
		return nil
	}
	a.p.datagrams.Add(1)
	return nil
}

// heard notes that the program has answered s at the target of in. in is not closed before udpIdle has passed.
func (a *senders) heard(s *sender, in *net.UDPConn) {
	s.mu.Lock()
	isNew := s.first != nil
	s.first = nil
	_ = in.SetReadDeadline(time.Now().Add(udpIdle))
	target := s.target
	s.mu.Unlock()
	if !isNew {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = target
	a.answered(s)
}

// elsewhere makes s try the next target if nothing listens at this one and the program has not answered before. The
// last datagram is sent again there. When all targets were tried in vain, the next datagram begins another round.
func (a *senders) elsewhere(s *sender) {
	s.mu.Lock()
	defer s.mu.Unlock()
	count := len(a.p.cfg.Datagrams)
	if s.first == nil || count < 2 {
		return
	}
	in, target, err := a.p.dialUDP(a.s.Port, (s.target+1)%count)
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.p.ctx.Err() != nil || a.all[s.key] != s { // whoever removed s closes its former socket
		_ = in.Close()
		return
	}
	_ = in.SetReadDeadline(time.Now().Add(udpIdle))
	_ = s.in.Close()
	s.tried++
	s.in, s.target = in, target
	if s.tried < count && len(s.first) > 0 {
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
		s.close()
	}
}

// dialUDP creates a socket that is connected to the program's port at the target with this index, or at the next one
// that exists in the namespace. Only an answer or an error shows later whether the program listens there.
func (p *Publisher) dialUDP(port uint16, from int) (in *net.UDPConn, target int, err error) {
	for i := range p.cfg.Datagrams {
		target = (from + i) % len(p.cfg.Datagrams)
		if in, err = p.dialAside(p.cfg.Datagrams[target], port); err == nil {
			return in, target, nil
		}
	}
	return nil, 0, err
}

// dialAside connects to the program's port from any other port. A socket with the same port would keep the program from
// binding to it, and could be connected to itself.
func (p *Publisher) dialAside(t Target, port uint16) (*net.UDPConn, error) {
	for {
		c, err := p.connectTo(t, port, unix.SOCK_DGRAM)
		if err != nil {
			return nil, err
		}
		if c.LocalAddr().(*net.UDPAddr).AddrPort().Port() != port {
			return c.(*net.UDPConn), nil
		}
		defer c.Close() // it stays open until the end, so that the kernel does not choose its port again
	}
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
