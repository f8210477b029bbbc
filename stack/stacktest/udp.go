package stacktest

import (
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// PacketConn is an app's UDP socket: a net.PacketConn, with deadlines. What is longer than the MTU is sent in
// fragments; what is received may have any length.
type PacketConn struct {
	*gonet.UDPConn
	ep tcpip.Endpoint
}

var _ net.PacketConn = (*PacketConn)(nil)

// ListenUDP binds a socket to src, an address of the app (zero: any, of both families) and port (0: any free one). It
// receives from everybody.
func (a *App) ListenUDP(src netip.AddrPort) (*PacketConn, error) {
	return a.udp(src, netip.AddrPort{})
}

// DialUDP binds a socket to src as ListenUDP does and connects it to dst: it receives from dst alone, and ICMP errors
// about what it sent come out of Read as errnos.
func (a *App) DialUDP(src, dst netip.AddrPort) (*PacketConn, error) {
	return a.udp(src, dst)
}

func (a *App) udp(src, dst netip.AddrPort) (*PacketConn, error) {
	fail := func(call string, err tcpip.Error) (*PacketConn, error) {
		return nil, &net.OpError{Op: call, Net: "udp", Addr: net.UDPAddrFromAddrPort(src), Err: sysError(call, err)}
	}
	of := src.Addr()
	if !of.IsValid() {
		of = dst.Addr() // IPv6, so both, if this is not valid either
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
	return &PacketConn{gonet.NewUDPConn(wq, ep), ep}, nil
}

// ReadFromAddrPort is that of net.UDPConn: the sender as it stood in the packet.
func (c *PacketConn) ReadFromAddrPort(b []byte) (int, netip.AddrPort, error) {
	n, from, err := c.UDPConn.ReadFrom(b)
	if err != nil {
		return n, netip.AddrPort{}, translate("recvfrom", err)
	}
	return n, unmap(from.(*net.UDPAddr).AddrPort()), nil
}

// WriteToAddrPort is that of net.UDPConn.
func (c *PacketConn) WriteToAddrPort(b []byte, dst netip.AddrPort) (int, error) {
	n, err := c.UDPConn.WriteTo(b, &net.UDPAddr{IP: dst.Addr().AsSlice(), Port: int(dst.Port())})
	return n, translate("sendto", err)
}

// ReadFrom is that of net.PacketConn.
func (c *PacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.ReadFromAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// WriteTo is that of net.PacketConn. addr is a *net.UDPAddr.
func (c *PacketConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	return c.WriteToAddrPort(b, unmap(addr.(*net.UDPAddr).AddrPort()))
}

// Read receives on a connected socket.
func (c *PacketConn) Read(b []byte) (int, error) {
	n, err := c.UDPConn.Read(b)
	return n, translate("read", err)
}

// Write sends on a connected socket.
func (c *PacketConn) Write(b []byte) (int, error) {
	n, err := c.UDPConn.Write(b)
	return n, translate("write", err)
}

// LocalAddrPort is the bound endpoint.
func (c *PacketConn) LocalAddrPort() netip.AddrPort {
	a, err := c.ep.GetLocalAddress()
	if err != nil {
		return netip.AddrPort{}
	}
	addr, _ := netip.AddrFromSlice(a.Addr.AsSlice())
	return netip.AddrPortFrom(addr, a.Port)
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
