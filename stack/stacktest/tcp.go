package stacktest

import (
	"context"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Conn is an app's TCP connection. In addition to net.Conn it has CloseRead and CloseWrite. Network errors are
// errnos, as in the net package (errors.Is(err, unix.ECONNRESET)).
type Conn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

// DialTCP connects as a program does. When ctx is done, the program gives up; as on Linux, it then sends nothing.
func (a *App) DialTCP(ctx context.Context, dst netip.AddrPort) (*Conn, error) {
	return a.DialTCPFrom(ctx, netip.AddrPort{}, dst)
}

// DialTCPFrom is DialTCP from a given source: an address of the app (zero: its first of the family) and port (0:
// any).
func (a *App) DialTCPFrom(ctx context.Context, src, dst netip.AddrPort) (*Conn, error) {
	fail := func(err error) (*Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if !src.Addr().IsValid() {
		addr, err := a.source(dst.Addr())
		if err != nil {
			return fail(os.NewSyscallError("connect", err))
		}
		src = netip.AddrPortFrom(addr, src.Port())
	}
	ep, wq, port, err := a.bindTCP(src)
	if err != nil {
		return fail(err)
	}
	key := dialKey{netip.AddrPortFrom(src.Addr(), port), dst}
	icmp := make(chan unix.Errno, 1)
	a.mu.Lock()
	a.dials[key] = icmp
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		delete(a.dials, key)
		a.mu.Unlock()
	}()

	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr := ep.Connect(full(dst))
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Close()
			return fail(ctx.Err())
		case errno := <-icmp:
			ep.Close()
			return fail(os.NewSyscallError("connect", errno))
		case <-ready:
			terr = ep.LastError()
		}
	}
	if terr != nil {
		ep.Close()
		select {
		case errno := <-icmp: // gVisor's reader was told too, but ours has the right code
			return fail(os.NewSyscallError("connect", errno))
		default:
		}
		return fail(sysError("connect", terr))
	}
	return &Conn{gonet.NewTCPConn(wq, ep), ep}, nil
}

// bindTCP returns a socket that is bound before connect, so that its port is known before the SYN is sent: an ICMP error
// is matched by it.
func (a *App) bindTCP(src netip.AddrPort) (ep tcpip.Endpoint, wq *waiter.Queue, port uint16, err error) {
	wq = new(waiter.Queue)
	ep, terr := a.ns.NewEndpoint(tcp.ProtocolNumber, network(src.Addr()), wq)
	if terr != nil {
		return nil, nil, 0, sysError("socket", terr)
	}
	ep.SocketOptions().SetReuseAddress(true)
	if terr = ep.Bind(full(src)); terr != nil {
		ep.Close()
		return nil, nil, 0, sysError("bind", terr)
	}
	local, terr := ep.GetLocalAddress()
	if terr != nil {
		ep.Close()
		return nil, nil, 0, sysError("getsockname", terr)
	}
	return ep, wq, local.Port, nil
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	return n, translate("read", err)
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	return n, translate("write", err)
}

// Abort closes with SO_LINGER 0, which sends RST.
func (c *Conn) Abort() {
	c.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
	_ = c.Close()
}

// SetReadBuffer limits how much the app's kernel accepts while the program does not read.
func (c *Conn) SetReadBuffer(bytes int) {
	c.ep.SocketOptions().SetReceiveBufferSize(int64(bytes), true)
}

// State returns the state of the endpoint in the words of RFC 9293: ESTABLISHED, FIN-WAIT1, CLOSE-WAIT …
func (c *Conn) State() string { return tcp.EndpointState(c.ep.State()).String() }

// WaitState waits until State is one of those given. It returns false if that does not happen within the time.
func (c *Conn) WaitState(within time.Duration, states ...string) bool {
	for end := time.Now().Add(within); ; time.Sleep(time.Millisecond) {
		now := c.State()
		for _, s := range states {
			if s == now {
				return true
			}
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// ListenTCP accepts connections from the other end of the device, for two Apps on one pipe. The stack of viasocks
// never dials in.
func (a *App) ListenTCP(src netip.AddrPort) (net.Listener, error) {
	l, err := gonet.ListenTCP(a.ns, full(src), network(src.Addr()))
	if err != nil {
		return nil, err // not l, which would be a nil in an interface
	}
	return l, nil
}
