package stacktest

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// PacketConn is an app's UDP socket and implements net.PacketConn. It sends datagrams longer than the MTU in
// fragments; received ones may have any length. gonet's PacketConn does not wake up when an ICMP error arrives.
type PacketConn struct {
	ep tcpip.Endpoint
	wq *waiter.Queue

	mu       sync.Mutex
	deadline time.Time     // of reads
	changed  chan struct{} // closed when deadline changes
}

var (
	_ net.PacketConn = (*PacketConn)(nil)
	_ net.Conn       = (*PacketConn)(nil)
)

// ListenUDP binds a socket to src, an address of the app (zero: any, of both families) and port (0: any free one). It
// receives from every sender.
func (a *App) ListenUDP(src netip.AddrPort) (*PacketConn, error) {
	return a.udp(src, netip.AddrPort{})
}

// DialUDP binds a socket to src like ListenUDP and connects it to dst: it receives only from dst, and Read returns
// ICMP errors about its datagrams as errnos.
func (a *App) DialUDP(src, dst netip.AddrPort) (*PacketConn, error) {
	return a.udp(src, dst)
}

func (a *App) udp(src, dst netip.AddrPort) (*PacketConn, error) {
	fail := func(call string, err tcpip.Error) (*PacketConn, error) {
		return nil, &net.OpError{Op: call, Net: "udp", Addr: net.UDPAddrFromAddrPort(src), Err: sysError(call, err)}
	}
	of := src.Addr()
	if !of.IsValid() {
		of = dst.Addr() // IPv6, which means both families, if this is invalid too
	}
	wq := new(waiter.Queue)
	ep, err := a.ns.NewEndpoint(udp.ProtocolNumber, network(of), wq)
	if err != nil {
		return fail("socket", err)
	}
	bind := tcpip.FullAddress{Port: src.Port()}
	if src.Addr().IsValid() && !src.Addr().IsUnspecified() {
		bind = full(src)
	}
	if err = ep.Bind(bind); err != nil {
		ep.Close()
		return fail("bind", err)
	}
	if dst.IsValid() {
		if err = ep.Connect(full(dst)); err != nil {
			ep.Close()
			return fail("connect", err)
		}
	}
	return &PacketConn{ep: ep, wq: wq, changed: make(chan struct{})}, nil
}

// ReadFromAddrPort is like that of net.UDPConn. It returns the sender as written in the packet.
func (c *PacketConn) ReadFromAddrPort(b []byte) (int, netip.AddrPort, error) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventErr | waiter.EventHUp)
	c.wq.EventRegister(&entry)
	defer c.wq.EventUnregister(&entry)
	for {
		w := tcpip.SliceWriter(b)
		res, err := c.ep.Read(&w, tcpip.ReadOptions{NeedRemoteAddr: true})
		switch err.(type) {
		case nil:
			addr, _ := netip.AddrFromSlice(res.RemoteAddr.Addr.AsSlice())
			return res.Count, netip.AddrPortFrom(addr, res.RemoteAddr.Port), nil
		case *tcpip.ErrWouldBlock:
		case *tcpip.ErrClosedForReceive:
			return 0, netip.AddrPort{}, c.fail("read", net.ErrClosed)
		default:
			return 0, netip.AddrPort{}, c.fail("read", sysError("recvfrom", err))
		}
		c.mu.Lock()
		deadline, changed := c.deadline, c.changed
		c.mu.Unlock()
		var timer <-chan time.Time
		if !deadline.IsZero() {
			timer = time.After(time.Until(deadline))
		}
		select {
		case <-ready:
		case <-changed:
		case <-timer:
			return 0, netip.AddrPort{}, c.fail("read", os.ErrDeadlineExceeded)
		}
	}
}

// WriteToAddrPort is like that of net.UDPConn. It does not block: if the device is full, the datagram is lost.
func (c *PacketConn) WriteToAddrPort(b []byte, dst netip.AddrPort) (int, error) {
	var o tcpip.WriteOptions
	if dst.IsValid() {
		to := full(dst)
		o.To = &to
	}
	n, err := c.ep.Write(bytes.NewReader(b), o)
	switch err.(type) {
	case nil:
	case *tcpip.ErrWouldBlock, *tcpip.ErrNoBufferSpace:
		return 0, c.fail("write", os.NewSyscallError("sendto", unix.ENOBUFS))
	case *tcpip.ErrClosedForSend:
		return 0, c.fail("write", net.ErrClosed)
	default:
		return int(n), c.fail("write", sysError("sendto", err))
	}
	return int(n), nil
}

// Read receives on a connected socket.
func (c *PacketConn) Read(b []byte) (int, error) {
	n, _, err := c.ReadFromAddrPort(b)
	return n, err
}

// Write sends on a connected socket.
func (c *PacketConn) Write(b []byte) (int, error) { return c.WriteToAddrPort(b, netip.AddrPort{}) }

// ReadFrom implements net.PacketConn.
func (c *PacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.ReadFromAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// WriteTo implements net.PacketConn. addr must be a *net.UDPAddr.
func (c *PacketConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	a := addr.(*net.UDPAddr).AddrPort()
	return c.WriteToAddrPort(b, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
}

// LocalAddrPort returns the bound endpoint.
func (c *PacketConn) LocalAddrPort() netip.AddrPort { return addrPort(c.ep.GetLocalAddress()) }

// LocalAddr returns the bound endpoint.
func (c *PacketConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.LocalAddrPort()) }

// RemoteAddr returns the endpoint that the socket is connected to, or nil.
func (c *PacketConn) RemoteAddr() net.Addr {
	if a := addrPort(c.ep.GetRemoteAddress()); a.IsValid() {
		return net.UDPAddrFromAddrPort(a)
	}
	return nil
}

func addrPort(a tcpip.FullAddress, err tcpip.Error) netip.AddrPort {
	if err != nil {
		return netip.AddrPort{}
	}
	addr, _ := netip.AddrFromSlice(a.Addr.AsSlice())
	return netip.AddrPortFrom(addr, a.Port)
}

// SetReadDeadline also affects a blocked read.
func (c *PacketConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	close(c.changed)
	c.changed = make(chan struct{})
	return nil
}

// SetWriteDeadline does nothing: writes do not block.
func (c *PacketConn) SetWriteDeadline(time.Time) error { return nil }

// SetDeadline is the same as SetReadDeadline.
func (c *PacketConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// Close closes the socket and ends a blocked read.
func (c *PacketConn) Close() error {
	c.ep.Close()
	return nil
}

func (c *PacketConn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "udp", Source: c.LocalAddr(), Err: err}
}
