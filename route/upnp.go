package route

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// gatewayWeb is where the gateway of UPnP describes itself.
var gatewayWeb = netip.AddrPortFrom(flow.Gateway4, portmap.SSDPPort)

const (
	upnpName = "upnp"
	// maxUPnP limits the connections of programs to the gateway. Over it, they are refused.
	maxUPnP = 16
	// upnpTime limits a request and its answer, which may wait for the proxy.
	upnpTime = 15 * time.Second
)

// upnp is the upstream of TCP connections to gatewayWeb: route/portmap itself answers them, at the other end of a socket
// pair. It is a net.Listener for http.Server.
type upnp struct {
	verdict *verdict
	web     http.Server
	conns   chan net.Conn
	open    atomic.Int32
	ended   chan struct{} // closed by close
	end     sync.Once
	served  sync.WaitGroup // Serve
}

// newUPnP answers by s until close is called.
func newUPnP(s *portmap.Server) *upnp {
	u := &upnp{conns: make(chan net.Conn, maxUPnP), ended: make(chan struct{})}
	u.verdict = &verdict{rule: "portmap", up: &upstream{Upstream: u, name: upnpName, own: true, count: new(upstreamCounters)}}
	u.web = http.Server{
		Handler: s, ReadTimeout: upnpTime, WriteTimeout: upnpTime, IdleTimeout: upnpTime, MaxHeaderBytes: 8 << 10,
		ErrorLog: log.New(io.Discard, "", 0),
	}
	u.served.Go(func() { _ = u.web.Serve(u) })
	return u
}

// close ends all connections and waits for that. u may be nil.
func (u *upnp) close() {
	if u == nil {
		return
	}
	_ = u.web.Close()
	_ = u.Close()
	u.served.Wait()
	u.drain()
}

// drain closes the connections that Serve does not take any more.
func (u *upnp) drain() {
	for {
		select {
		case c := <-u.conns:
			c.Close()
		default:
			return
		}
	}
}

// Name implements Upstream.
func (*upnp) Name() string { return upnpName }

// DialStream implements Upstream.
func (u *upnp) DialStream(_ context.Context, _ *relay.Loop, d Dest, done func(s loop.Socket, err error)) {
	if u.open.Add(1) > maxUPnP {
		u.open.Add(-1)
		done(loop.NoSocket, unix.ECONNREFUSED)
		return
	}
	near, far, err := socketPair()
	if err != nil {
		u.open.Add(-1)
		done(loop.NoSocket, err)
		return
	}
	// The channel has room for all connections that may be open.
	u.conns <- &upnpConn{Conn: far, from: net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.Src, d.SrcPort)), u: u}
	select {
	case <-u.ended:
		u.drain()
	default:
	}
	done(loop.Unwatched(near), nil)
}

// socketPair returns a socket for a loop, and the other end.
func socketPair() (near int, far net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, nil, err
	}
	f := os.NewFile(uintptr(fds[1]), upnpName)
	defer f.Close() // FileConn has a copy
	if far, err = net.FileConn(f); err != nil {
		unix.Close(fds[0])
		return -1, nil, err
	}
	return fds[0], far, nil
}

// OpenPackets implements Upstream. It fails, because searches reach route/portmap without an upstream.
func (*upnp) OpenPackets(
	_ context.Context,
	_ *relay.Loop,
	_ func([]flow.Packet),
	done func(relay.PacketLink, error),
	_ func(error),
) {
	done(nil, unix.ENETUNREACH)
}

// Accept implements net.Listener.
func (u *upnp) Accept() (net.Conn, error) {
	select {
	case c := <-u.conns:
		return c, nil
	case <-u.ended:
		return nil, errors.New("the gateway is closed")
	}
}

// Close implements net.Listener.
func (u *upnp) Close() error {
	u.end.Do(func() { close(u.ended) })
	return nil
}

// Addr implements net.Listener.
func (*upnp) Addr() net.Addr { return net.TCPAddrFromAddrPort(gatewayWeb) }

// upnpConn is a connection whose far end is the program.
type upnpConn struct {
	net.Conn
	from net.Addr
	u    *upnp
	once sync.Once
}

// RemoteAddr implements net.Conn.
func (c *upnpConn) RemoteAddr() net.Addr { return c.from }

// Close implements net.Conn.
func (c *upnpConn) Close() error {
	c.once.Do(func() { c.u.open.Add(-1) })
	return c.Conn.Close()
}
