package sockstest

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Association is one UDP ASSOCIATE of a client. Tests can change its behaviour.
type Association struct {
	s     *Server
	c     stream
	req   Request
	relay *net.UDPConn // to the client; nil over TCP

	sending sync.Mutex // frames over TCP, one after the other
	mu      sync.Mutex
	closed  bool
	fault   Fault
	client  netip.AddrPort                  // source of its last datagram
	out     [2]*net.UDPConn                 // to the world, for IPv4 and IPv6, created when first needed
	varied  map[netip.AddrPort]*net.UDPConn // with Fault.VaryUDP: a socket for each destination
	named   map[netip.AddrPort]Addr         // the names that datagrams went to, by their real destination
}

func (s *Server) associate(c stream, req Request, f Fault) {
	if s.n.assocsOpen.Load() >= maxAssocs {
		s.answer(c, Reply(1), reply(1, Addr{}))
		return
	}
	a := &Association{s: s, c: c, req: req, fault: f}
	at := netip.AddrPortFrom(unmap(c.LocalAddr()).Addr(), 0)
	relay, err := s.listenUDP(at)
	if err != nil {
		s.answer(c, Reply(1), reply(1, Addr{}))
		return
	}
	a.relay = relay
	defer a.close()
	s.mu.Lock()
	s.assocs[a] = struct{}{}
	s.mu.Unlock()
	s.n.assocs.Add(1)
	s.n.assocsOpen.Add(1)
	defer func() {
		s.mu.Lock()
		delete(s.assocs, a)
		s.mu.Unlock()
		s.n.assocsOpen.Add(-1)
	}()

	defer context.AfterFunc(s.ctx, a.close)()
	if f.DeafUDP {
		relay.Close()
	}
	s.wg.Go(a.fromClient)
	bound := f.Bound
	if bound == nil {
		b := AddrFrom(a.Relay())
		bound = &b
	}
	if !s.answer(c, f, reply(0, *bound)) {
		return
	}
	if f.CloseUDP {
		s.end(c, FIN)
		return
	}
	s.end(c, Hold)
}

func (s *Server) listenUDP(at netip.AddrPort) (u *net.UDPConn, err error) {
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	err = s.enter(func() (err error) {
		u, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
		return err
	})
	if err == nil {
		u.SetReadBuffer(4 << 20) // for bursts of a fast client: what is lost here would be blamed on the client
	}
	return u, err
}

func (a *Association) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	if a.relay != nil {
		a.relay.Close()
	}
	for _, u := range a.out {
		if u != nil {
			u.Close()
		}
	}
	for _, u := range a.varied {
		u.Close()
	}
}

// fromClient carries datagrams to the world.
func (a *Association) fromClient() {
	buf := make([]byte, 65536)
	control := unmap(a.c.RemoteAddr()).Addr()
	for {
		n, from, err := a.relay.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about a client that went away
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		dst, payload, ok := parseDatagram(buf[:n])
		if !ok || from.Addr() != control || a.faultNow().DropUDP {
			a.s.n.udpBad.Add(1)
			continue
		}
		a.mu.Lock()
		a.client = from
		end := a.fault.EndUDP
		a.mu.Unlock()
		if end != nil && end(dst) {
			a.Cut(FIN)
			return
		}
		to, err := a.target(dst)
		if err != nil {
			a.s.n.udpBad.Add(1)
			continue
		}
		u := a.outTo(to)
		if u == nil {
			a.s.n.udpBad.Add(1)
			continue
		}
		// Count first, so that a test that sees the datagram also sees it counted.
		a.s.n.udpUp.Add(1)
		if _, err := u.WriteToUDPAddrPort(payload, to); err != nil {
			a.s.n.udpUp.Add(^uint64(0))
			a.s.n.udpBad.Add(1)
		}
	}
}

var errNames = errors.New("a fault drops datagrams to names")

// target returns the real destination of a datagram to dst.
func (a *Association) target(dst Addr) (netip.AddrPort, error) {
	if dst.Name != "" && a.faultNow().DropNames {
		return netip.AddrPort{}, errNames
	}
	to, err := a.s.real(a.s.ctx, dst)
	if err == nil && dst.Name != "" {
		a.s.n.udpNamed.Add(1)
		a.mu.Lock()
		if a.named == nil {
			a.named = make(map[netip.AddrPort]Addr)
		}
		a.named[to] = dst
		a.mu.Unlock()
	}
	return to, err
}

// sourceOf returns the source for the header of a datagram from an endpoint.
func (a *Association) sourceOf(from netip.AddrPort) Addr {
	a.mu.Lock()
	name, ok := a.named[from]
	asName := a.fault.AsName
	a.mu.Unlock()
	if ok && asName {
		return name
	}
	a.s.mu.Lock()
	defer a.s.mu.Unlock()
	if v, ok := a.s.unredir[from]; ok {
		from = v
	}
	return AddrFrom(from)
}

// outTo returns the socket that sends to a destination, or nil if it cannot be created.
func (a *Association) outTo(to netip.AddrPort) *net.UDPConn {
	a.mu.Lock()
	if a.varied == nil {
		a.varied = make(map[netip.AddrPort]*net.UDPConn)
	}
	u, vary := a.varied[to], a.fault.VaryUDP
	a.mu.Unlock()
	switch {
	case !vary:
		return a.outFor(to.Addr())
	case u != nil:
		return u
	}
	at := netip.IPv4Unspecified()
	if to.Addr().Is6() {
		at = netip.IPv6Unspecified()
	}
	u, err := a.s.listenUDP(netip.AddrPortFrom(at, 0))
	if err != nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		u.Close()
		return nil
	}
	a.varied[to] = u
	a.s.wg.Go(func() { a.fromWorld(u) })
	return u
}

// outFor returns the socket to the world for ip's family, or nil if it cannot be created.
func (a *Association) outFor(ip netip.Addr) *net.UDPConn {
	i, at := 0, netip.IPv4Unspecified()
	if ip.Is6() {
		i, at = 1, netip.IPv6Unspecified()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.out[i] == nil && !a.closed {
		u, err := a.s.listenUDP(netip.AddrPortFrom(at, 0))
		if err != nil {
			return nil
		}
		a.out[i] = u
		a.s.wg.Go(func() { a.fromWorld(u) })
	}
	return a.out[i]
}

// fromWorld carries everything that reaches our endpoint back to the client, with its true source.
func (a *Association) fromWorld(u *net.UDPConn) {
	buf := make([]byte, 65536)
	for {
		n, from, err := u.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		a.s.n.udpDown.Add(1)
		if a.Send(a.sourceOf(from), buf[:n]) != nil {
			a.s.n.udpDown.Add(^uint64(0))
			a.s.n.udpBad.Add(1)
		}
	}
}

var (
	errNoClient = errors.New("the client has not sent a datagram yet")
	errDropped  = errors.New("dropped by a fault")
)

// SetFault changes how the association's datagrams are treated from now on. The answer was already sent.
func (a *Association) SetFault(f Fault) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fault = f
}

func (a *Association) faultNow() Fault {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fault
}

// Send sends a datagram to the client as if src had sent it.
func (a *Association) Send(src Addr, payload []byte) error {
	f := a.faultNow()
	if f.DropUDP {
		return errDropped
	}
	if a.OverTCP() {
		return a.sendFrame(f, src, payload)
	}
	b := append([]byte{0, 0, f.Frag}, appendAddr(nil, src)...)
	if f.BadUDP {
		b, payload = b[:6], nil
	}
	b = append(b, payload...)
	if f.MangleTo != nil {
		f.MangleTo(b)
	}
	return a.SendRaw(b)
}

// SendRaw sends b to the client from the relay, or over TCP, without adding a header.
func (a *Association) SendRaw(b []byte) error {
	if a.OverTCP() {
		_, err := a.c.Write(b)
		return err
	}
	to := a.Client()
	if !to.IsValid() {
		return errNoClient
	}
	_, err := a.relay.WriteToUDPAddrPort(b, to)
	return err
}

// SendStranger sends b to the client from an endpoint other than the relay's.
func (a *Association) SendStranger(b []byte) error {
	to := a.Client()
	if !to.IsValid() {
		return errNoClient
	}
	u, err := a.s.listenUDP(netip.AddrPortFrom(a.Relay().Addr(), 0))
	if err != nil {
		return err
	}
	defer u.Close()
	_, err = u.WriteToUDPAddrPort(b, to)
	return err
}

// Cut ends the control connection from the server's side, and thereby the association.
func (a *Association) Cut(end End) {
	if end == RST {
		setLinger0(a.c)
	}
	a.c.Close()
}

// Request returns the request that made the association.
func (a *Association) Request() Request { return a.req }

// Relay returns the destination of the client's datagrams. It is invalid over TCP.
func (a *Association) Relay() netip.AddrPort { return a.relayAddr() }

// Client returns the source of the client's datagrams. It is invalid before the first one.
func (a *Association) Client() netip.AddrPort {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.client
}

// World returns the association's endpoint to IPv4 or IPv6 destinations, with an unspecified address. It is invalid
// before the first datagram of that family.
func (a *Association) World(ipv6 bool) netip.AddrPort {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := 0
	if ipv6 {
		i = 1
	}
	if a.out[i] == nil {
		return netip.AddrPort{}
	}
	return unmap(a.out[i].LocalAddr())
}

// Associations returns the open associations, in no particular order.
func (s *Server) Associations() []*Association {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*Association
	for a := range s.assocs {
		all = append(all, a)
	}
	return all
}

// WaitAssociations waits until n associations are open, and returns them.
func (s *Server) WaitAssociations(n int, limit time.Duration) ([]*Association, bool) {
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		if all := s.Associations(); len(all) == n {
			return all, true
		} else if time.Now().After(end) {
			return all, false
		}
	}
}

// parseDatagram removes the header of a client's datagram.
func parseDatagram(b []byte) (dst Addr, payload []byte, ok bool) {
	if len(b) < 4 || b[0] != 0 || b[1] != 0 || b[2] != 0 {
		return Addr{}, nil, false
	}
	r := bytes.NewReader(b[4:])
	dst, err := readAddr(r, b[3])
	return dst, b[len(b)-r.Len():], err == nil
}
