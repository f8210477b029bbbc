package stack

import (
	"fmt"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/ports"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// A handshake needs no goroutine of its own. An accepted SYN is given to a listening endpoint of gVisor, which makes
// the connection's endpoint for whatever address and port the SYN names, and sends the SYN-ACK. When the app's ACK
// has come, the listener has a connection to accept. All this happens on gVisor's TCP processors, whose stacks have
// already grown.
//
// gVisor does not report a failed handshake. After every RST for a handshake, the pending table therefore looks at
// its endpoint a moment later, and again until gVisor has decided (pendingTable.look).

// listener is gVisor's listening endpoint for one family. It is removed from the demultiplexer: no segment from the
// device reaches it, only what give passes to it.
type listener struct {
	s      *shard
	ep     tcpip.Endpoint
	wq     waiter.Queue
	entry  waiter.Entry
	queue  packetQueue
	strays *sync.WaitGroup
}

// packetQueue is the interface through which gVisor's demultiplexer passes a segment to a TCP endpoint.
type packetQueue interface {
	QueuePacket(gstack.TransportEndpoint, gstack.TransportEndpointID, *gstack.PacketBuffer)
}

const (
	// listenPort can be any port: the listener's address and port do not restrict what it accepts.
	listenPort = 1
	// backlog is never reached, because the pending table has the budgets. Above the backlog gVisor would use SYN
	// cookies, which lose the window scale.
	backlog = 1 << 30
)

// listen makes the listener for one family.
func (s *shard) listen(e *engine, proto tcpip.NetworkProtocolNumber) (*listener, error) {
	l := &listener{s: s, strays: &e.strays}
	var ok bool
	if l.queue, ok = e.ns.TransportProtocolInstance(tcp.ProtocolNumber).(packetQueue); !ok {
		return nil, fmt.Errorf("cannot listen: gVisor's TCP takes no segments for an endpoint")
	}
	// No flow has a loopback address at its other end, so no reservation of a port conflicts with the listener's.
	at := tcpip.AddrFrom4([4]byte{127, 0, 0, 1})
	if proto == header.IPv6ProtocolNumber {
		at = header.IPv6Loopback
	}
	ep, err := e.ns.NewEndpoint(tcp.ProtocolNumber, proto, &l.wq)
	if err != nil {
		return nil, fmt.Errorf("cannot listen: %v", err)
	}
	l.ep = ep
	ep.SocketOptions().SetV6Only(true)
	if err = ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: at, Port: listenPort}); err == nil {
		err = ep.Listen(backlog)
	}
	if err != nil {
		ep.Close()
		return nil, fmt.Errorf("cannot listen: %v", err)
	}
	id := gstack.TransportEndpointID{LocalPort: listenPort, LocalAddress: at}
	nets := []tcpip.NetworkProtocolNumber{proto}
	e.ns.UnregisterTransportEndpoint(nets, tcp.ProtocolNumber, id, l.ep.(gstack.TransportEndpoint), ports.Flags{}, 0)
	l.entry.Init(l, waiter.ReadableEvents)
	l.wq.EventRegister(&l.entry)
	return l, nil
}

// give passes a SYN to the listener, which soon begins the handshake.
func (l *listener) give(id gstack.TransportEndpointID, pkt *gstack.PacketBuffer) {
	l.queue.QueuePacket(l.ep.(gstack.TransportEndpoint), id, pkt)
}

// NotifyEvent is called by gVisor when there is a connection to accept. The lock of some connection's endpoint is
// held, so nothing here may ask an endpoint for more than its addresses.
func (l *listener) NotifyEvent(waiter.EventMask) {
	for {
		ep, wq, err := l.ep.Accept(nil)
		if err != nil {
			return // another processor accepted it
		}
		l.s.shaken(l, ep, wq)
	}
}

// close ends the listener and resets the connections that it has not passed on. After it returns, the listener passes
// on no more connections.
func (l *listener) close() {
	l.wq.EventUnregister(&l.entry) // waits for running calls of NotifyEvent, with which Close could deadlock
	l.ep.Close()
}

// open lets gVisor answer the stored SYN and complete the handshake.
func (s *shard) open(e *pendingSYN, pkt *gstack.PacketBuffer) {
	// Data in a SYN (TCP Fast Open) is sent again if it is not acknowledged. The checksum was verified when the SYN
	// arrived.
	pkt.Data().CapLength(0)
	pkt.RXChecksumValidated = true
	id, _ := transportID(e.key)
	s.engine.Load().listener(e.key).give(id, pkt)
	pkt.DecRef()
}

// listener returns the listener for the key's family.
func (e *engine) listener(key tuple) *listener {
	if key.dst.Addr().Is4() {
		return e.listen4
	}
	return e.listen6
}

// transportID returns gVisor's identification of the connection key.
func transportID(key tuple) (gstack.TransportEndpointID, tcpip.NetworkProtocolNumber) {
	proto := header.IPv4ProtocolNumber
	if key.dst.Addr().Is6() {
		proto = header.IPv6ProtocolNumber
	}
	return gstack.TransportEndpointID{
		LocalPort: key.dst.Port(), LocalAddress: addrTo(key.dst.Addr()),
		RemotePort: key.src.Port(), RemoteAddress: addrTo(key.src.Addr()),
	}, proto
}

// tupleOf is the inverse of transportID.
func tupleOf(id *gstack.TransportEndpointID) tuple {
	return tuple{
		netip.AddrPortFrom(addrFrom(id.RemoteAddress), id.RemotePort),
		netip.AddrPortFrom(addrFrom(id.LocalAddress), id.LocalPort),
	}
}

// shaken takes over the endpoint of a completed handshake. Locks of gVisor are held.
func (s *shard) shaken(l *listener, ep tcpip.Endpoint, wq *waiter.Queue) {
	e := s.pending.take(tupleOf(&ep.(*tcp.Endpoint).TransportEndpointInfo.ID))
	if e == nil {
		// It was given up meanwhile. No method of the endpoint may be called here, so a goroutine ends it; this is
		// rare.
		l.strays.Go(func() {
			ep.Abort()
			ep.Close()
		})
		return
	}
	st := &stream{s: s, l: e.listener, ep: ep, wq: wq}
	st.watch()
	e.listener.Opened(st, nil)
	st.first()
	s.pending.shaking.Done()
}

// abortHandshake ends a handshake that failed or takes too long. The caller must not hold locks of gVisor.
func (s *shard) abortHandshake(key tuple) {
	ep := s.endpoint(key)
	e := s.pending.take(key)
	if e == nil {
		return // it is open
	}
	if ep != nil {
		ep.Abort()
	}
	s.stats.AcceptFailed.Add(1)
	e.listener.Opened(nil, ErrAppGone)
	s.pending.shaking.Done()
}

// endpoint returns gVisor's endpoint of a connection or handshake, or nil.
func (s *shard) endpoint(key tuple) gstack.TransportEndpoint {
	id, proto := transportID(key)
	return s.engine.Load().ns.FindTransportEndpoint(proto, tcp.ProtocolNumber, id, nicID)
}

// shakeState tells how far gVisor is with a handshake.
type shakeState uint8

const (
	shakeNone   shakeState = iota // there is no endpoint: not yet made, or gone
	shakeGoesOn                   // waiting for the app's ACK
	shakeFailed
	shakeDone // the listener is told, or has been
)

// handshake returns the state of the handshake of key.
func (s *shard) handshake(key tuple) shakeState {
	ep, ok := s.endpoint(key).(*tcp.Endpoint)
	if !ok {
		return shakeNone
	}
	switch ep.EndpointState() {
	case tcp.StateConnecting, tcp.StateSynRecv:
		return shakeGoesOn
	case tcp.StateError, tcp.StateClose:
		return shakeFailed
	}
	return shakeDone
}

// resetWatch sits between the IP layer and the transport layer and tells the pending table of each RST for a
// handshake. It also hands over packets that gVisor has reassembled for another shard.
type resetWatch struct {
	gstack.TransportDispatcher
	s *shard
}

// DeliverTransportPacket implements gVisor's TransportDispatcher.
func (w *resetWatch) DeliverTransportPacket(
	proto tcpip.TransportProtocolNumber, pkt *gstack.PacketBuffer,
) gstack.TransportPacketDisposition {
	if w.s.rehome(byte(proto), pkt) {
		return gstack.TransportPacketHandled
	}
	if h := pkt.TransportHeader().Slice(); proto == header.TCPProtocolNumber && len(h) >= tcpHeaderLen &&
		header.TCP(h).Flags()&header.TCPFlagRst != 0 && w.s.pending != nil {
		return w.deliverReset(pkt, header.TCP(h))
	}
	return w.TransportDispatcher.DeliverTransportPacket(proto, pkt)
}

func (w *resetWatch) deliverReset(pkt *gstack.PacketBuffer, h header.TCP) gstack.TransportPacketDisposition {
	ip := pkt.Network()
	key := tuple{
		netip.AddrPortFrom(addrFrom(ip.SourceAddress()), h.SourcePort()),
		netip.AddrPortFrom(addrFrom(ip.DestinationAddress()), h.DestinationPort()),
	}
	seq := h.SequenceNumber()
	opening := w.s.pending.opening(key)
	made := opening && w.s.endpoint(key) != nil
	d := w.TransportDispatcher.DeliverTransportPacket(header.TCPProtocolNumber, pkt)
	if opening {
		w.s.pending.disturbed(key, seq, made)
	}
	return d
}
