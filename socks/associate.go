package socks

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

const (
	// With these values a dead server is noticed after 90 s. Until then the datagrams of its association are lost
	// silently.
	keepaliveIdle, keepaliveInterval, keepaliveCount = 60, 10, 3

	// maxJunk is the number of bytes that a server may send on a control connection before the association is ended.
	// RFC 1928 defines no message there.
	maxJunk = 1024
)

// Association is the state of a UDP ASSOCIATE (RFC 1928, sections 6 and 7). It lives as long as its control
// connection, which the loop watches and closes. Its methods may be called from any goroutine.
type Association struct {
	loop.Node
	l      *loop.Loop
	d      *Dialer
	server string
	relay  netip.AddrPort
	fd     int // the control connection; used only on the loop
	junk   int
	uot    bool // the datagrams travel in the connection itself
	taken  bool // Stream has given the connection away; used only on the loop

	mu      sync.Mutex
	onClose func(error)
	onOver  func() // nil: not set, or already called
	gone    func() // the same for the group
	over    bool   // shut has closed the control connection
	ended   bool   // the control connection is closed, or Close was called
	err     error  // why it ended; nil when Close was called
}

// closing is the event bit that Close sets on an Association.
const closing = loop.Own

// associated makes an Association of a granted dial. The loop keeps the descriptor.
func (p *dial) associated(s loop.Socket) {
	if p.c.server.options.uot {
		p.overTCP(s)
		return
	}
	relay, repaired := repairRelay(p.hs.Bound(), p.serverAddr(), p.d.opts.CanBePeer, OnHost)
	if repaired {
		p.d.log.Debug("relay address repaired", "server", p.c.server, "answered", p.hs.Bound().String(), "used", relay.String())
	}
	if p.c.server.path == "" {
		if err := setKeepalive(s.FD()); err != nil {
			s.Close()
			p.assocDone(nil, fmt.Errorf("cannot set keepalive: %w", err))
			return
		}
	}
	p.keep(&Association{l: p.l, d: p.d, server: p.c.server.String(), relay: relay}, s)
}

// overTCP makes an Association of a granted CONNECT by sending the request of UDP over TCP. A new connection always
// has room for it in the send buffer.
func (p *dial) overTCP(s loop.Socket) {
	if n, err := write(s.FD(), uotRequest); err != nil || n < len(uotRequest) {
		s.Close()
		p.assocDone(nil, &ServerError{Server: p.c.server.String(), Op: OpAssociation, Err: cmpError(err, errUoTShort)})
		return
	}
	_ = setKeepalive(s.FD()) // inside TLS it is a unix socket, which has no keepalive
	p.keep(&Association{l: p.l, d: p.d, server: p.c.server.String(), uot: true}, s)
}

// keep lets the loop watch the connection s for a, and passes a to the caller of Associate.
func (p *dial) keep(a *Association, s loop.Socket) {
	a.fd = s.FD()
	a.Init(a)
	if !a.l.Join(&a.Node) {
		s.Close()
		p.assocDone(nil, ErrClosed)
		return
	}
	a.l.Adopt(&a.Node, s)
	a.l.Enqueue(&a.Node) // it may have been closed already
	p.d.assocs.Add(1)
	p.assocDone(a, nil)
}

func setKeepalive(fd int) error {
	for _, o := range [...][3]int{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepaliveIdle},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepaliveInterval},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepaliveCount},
	} {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return err
		}
	}
	return nil
}

// OverTCP reports whether the datagrams travel in the connection itself. Then Stream returns that connection, and
// there is no relay.
func (a *Association) OverTCP() bool { return a.uot }

// Stream returns the connection that carries the frames of UDP over TCP in both directions (see UoTCodec). The caller
// owns it. Stream may be called once, on the event loop. The association continues to exist, so that its group can
// end it, until Close is called; the owner of the connection must call Close when it sees the connection end. The
// result is loop.NoSocket if the association is over or has a relay.
func (a *Association) Stream() loop.Socket {
	if !a.uot || a.fd < 0 {
		return loop.NoSocket
	}
	s := a.l.HandOver(&a.Node, a.fd)
	a.fd, a.taken = -1, true
	return s
}

// Relay returns the endpoint to which datagrams are sent, already repaired (see repairRelay). It is invalid for UDP
// over TCP. Otherwise it is always a valid address and port: the server's own address, or one that the server named
// and that has no nearer scope than the server's.
func (a *Association) Relay() netip.AddrPort { return a.relay }

// Server returns the URL of the server that holds the association, without credentials.
func (a *Association) Server() string { return a.server }

// Dial opens a new UDP socket and connects it to the relay, so that the kernel drops datagrams from other senders.
// The socket is non-blocking and close-on-exec, and Options.PrepareSocket was called for it. The caller owns it. It stays
// open when the association ends.
func (a *Association) Dial() (fd int, err error) {
	var sa sockaddrRoom
	if err := sa.set(a.relay); err != nil {
		return -1, fmt.Errorf("cannot use the relay %v: %w", a.relay, err)
	}
	fd, err = unix.Socket(sa.domain(), unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return -1, fmt.Errorf("cannot make a socket: %w", err)
	}
	if prepare := a.d.opts.PrepareSocket; prepare != nil {
		if err := prepare(fd); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("cannot make a socket: %w", err)
		}
	}
	if e := sa.connect(fd); e != 0 {
		unix.Close(fd)
		return -1, fmt.Errorf("cannot reach the relay %v: %w", a.relay, e)
	}
	return fd, nil
}

// OnClose sets the function that is called once when the control connection ends for any reason except Close. Its
// argument is a *ServerError or ErrClosed. If the connection has already ended, f is called at once; otherwise it is
// called on the event loop and must not block. A second call of OnClose replaces the first function.
func (a *Association) OnClose(f func(error)) {
	a.mu.Lock()
	err := a.err
	if err == nil {
		a.onClose = f
	} else {
		a.err = nil // reported once
	}
	a.mu.Unlock()
	if err != nil {
		f(err)
	}
}

// Close ends the association, so that the server stops relaying. The function set by OnClose is not called. Close
// does not wait and may be called twice.
func (a *Association) Close() error {
	a.mu.Lock()
	was := a.ended
	a.ended, a.onClose, a.err = true, nil, nil
	a.mu.Unlock()
	if !was {
		a.l.Note(&a.Node, closing) // if the loop is closed, it has already closed the descriptor
	}
	return nil
}

// OnOver sets the function that is called once when the association is over for any reason, including Close. It is
// called on the event loop, where it must not block, or at once if the association is already over.
func (a *Association) OnOver(f func()) {
	a.mu.Lock()
	over := a.over
	if !over {
		a.onOver = f
	}
	a.mu.Unlock()
	if over {
		f()
	}
}

// shut closes the control connection. It runs on the loop.
func (a *Association) shut() {
	if a.fd < 0 && !a.taken {
		return
	}
	if a.fd >= 0 {
		a.l.Forget(&a.Node)
		unix.Close(a.fd)
	}
	a.fd, a.taken = -1, false
	a.l.Leave(&a.Node)
	a.d.assocs.Add(-1)
	a.mu.Lock()
	f, gone := a.onOver, a.gone
	a.over, a.onOver, a.gone = true, nil, nil
	a.mu.Unlock()
	if f != nil {
		f()
	}
	if gone != nil {
		gone()
	}
}

// end handles a control connection that ended by itself. It runs on the loop.
func (a *Association) end(err error) {
	a.shut()
	a.mu.Lock()
	f := a.onClose
	switch {
	case a.ended: // Close was called, and its turn on the loop comes later
		f = nil
	case f == nil:
		a.err = err // reported when OnClose is called
	}
	a.ended, a.onClose = true, nil
	a.mu.Unlock()
	if f != nil {
		f(err)
	}
}

// Shutdown implements loop.Task.
func (a *Association) Shutdown() { a.end(ErrClosed) }

// Turn implements loop.Task.
func (a *Association) Turn() (again bool) {
	switch {
	case a.fd < 0 && !a.taken:
		return false
	case a.Got&closing != 0:
		a.shut()
		return false
	case a.Got&loop.In == 0 || a.taken:
		return false
	}
	var b [256]byte
	n, err := read(a.fd, b[:])
	switch {
	case err == unix.EAGAIN:
		a.Got &^= loop.In
		return false
	case err == nil && n == 0:
		err = fmt.Errorf("it closed the control connection: %w", io.EOF)
	case err == nil:
		if a.junk += n; a.junk <= maxJunk {
			return true
		}
		err = fmt.Errorf("%w: it talks on the control connection", ErrMalformed)
	}
	a.end(&ServerError{Server: a.server, Op: OpAssociation, Err: err})
	return false
}

// repairRelay turns the answer to UDP ASSOCIATE into an endpoint that can be used. Servers behind NAT answer with
// addresses that only they can reach. The address is replaced by that of the server if it is unspecified, a name, or
// of a nearer scope than the server's own (a private address of a public server, a loopback address of any server
// that is not on loopback). It is also replaced if datagrams must never be sent there: canBePeer refuses it, or it is
// an address of this host while the server is elsewhere. Port 0 is replaced by the server's port.
func repairRelay(
	bound Addr,
	server netip.AddrPort,
	canBePeer, onHost func(netip.Addr) bool,
) (relay netip.AddrPort, repaired bool) {
	ip, port := bound.IP.Unmap(), bound.Port
	use := bound.Name == "" && port != 0
	switch {
	case !use || ip == server.Addr():
	case scope(ip) < max(scope(server.Addr()), scopeHost):
		use = false
	case ip.IsLoopback(): // the server's address is loopback too
	case ip.Is6() && ip.IsLinkLocalUnicast(): // SOCKS cannot carry the zone
		use = false
	default:
		use = canBePeer(ip) && (!onHost(ip) || onHost(server.Addr()))
	}
	if !use {
		ip, repaired = server.Addr(), true
	}
	if port == 0 {
		port = server.Port()
	}
	return netip.AddrPortFrom(ip, port), repaired
}

// OnHost reports whether ip is an address of the calling thread's network namespace. If that cannot be determined, it
// returns true.
func OnHost(ip netip.Addr) bool {
	if ip.IsLoopback() {
		return true
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true
	}
	return slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(net.IP(ip.WithZone("").AsSlice()))
	})
}

// Scopes of addresses, from the narrowest to the widest.
const (
	scopeNone = iota // unspecified, multicast, broadcast: never a relay
	scopeHost
	scopePrivate
	scopePublic
)

// Address ranges that netip has no method for: the shared address space of RFC 6598, class E with the broadcast
// address, and "this network". Options.CanBePeer knows the ranges that the caller uses itself.
var (
	sharedNet = netip.MustParsePrefix("100.64.0.0/10")
	classE    = netip.MustParsePrefix("240.0.0.0/4")
	thisNet   = netip.MustParsePrefix("0.0.0.0/8")
)

func scope(ip netip.Addr) int {
	switch {
	case !ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast() || classE.Contains(ip) || thisNet.Contains(ip):
		return scopeNone
	case ip.IsLoopback():
		return scopeHost
	case ip.IsPrivate() || ip.IsLinkLocalUnicast() || sharedNet.Contains(ip):
		return scopePrivate
	}
	return scopePublic
}
