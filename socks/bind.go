package socks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
)

// DefaultBindTimeout is how long a BIND waits for its peer. It is somewhat longer than the kernel tries to connect.
const DefaultBindTimeout = 3 * time.Minute

// ErrNoPeer means that no peer connected to the BIND in time.
var ErrNoPeer = fmt.Errorf("no peer connected: %w", os.ErrDeadlineExceeded)

var errNoPort = errors.New("it names no port")

// Bind asks the server to listen for one connection from dst, and returns at once (RFC 1928, section 4; SOCKS4 has
// BIND too). Servers compare only the address of dst; a zero address allows any peer. When the server listens, bound
// is called with the endpoint to give to the peer, repaired like that of an association. When the peer has connected,
// done is called with a socket, as by Connect, and the peer's address. If any step fails, done is called with
// loop.NoSocket and an error as from Connect; bound may then never be called. The error is ErrNoPeer after
// DefaultBindTimeout. Both functions are called on the event loop and must not block.
func (c *Client) Bind(
	ctx context.Context,
	l *loop.Loop,
	dst Addr,
	bound func(netip.AddrPort),
	done func(fd int, peer netip.AddrPort, err error),
) {
	c.bind(ctx, l, dst, c.d.bindTimeout, bound, done)
}

// bind is Bind with a limit of its own for the wait.
func (c *Client) bind(
	ctx context.Context,
	l *loop.Loop,
	dst Addr,
	wait time.Duration,
	bound func(netip.AddrPort),
	done func(fd int, peer netip.AddrPort, err error),
) {
	granted := func(p *dial) {
		if p.state == waiting { // the second reply
			peer := p.hs.Bound().AddrPort()
			fd := p.l.HandOver(&p.Node, p.fd).Release()
			p.fd = -1
			p.leave()
			done(fd, peer, nil)
			return
		}
		if p.hs.Bound().Port == 0 {
			p.fault(OpHandshake, fmt.Errorf("%w: %w", ErrMalformed, errNoPort))
			return
		}
		at, _ := repairRelay(p.hs.Bound(), p.serverAddr(), p.d.opts.CanBePeer, OnHost)
		p.state = waiting
		p.hs.Again()
		p.l.SetTimer(&p.Node, p.l.Now()+wait)
		if c.server.path == "" {
			_ = setKeepalive(p.fd) // a server that is gone says nothing, and neither do we; inside TLS it is a unix socket
		}
		bound(at)
		if p.state == waiting { // bound may have cancelled the dial
			p.shake()
		}
	}
	c.d.start(&dial{d: c.d, l: l, c: c, ctx: ctx, cmd: CmdBind, dst: dst, granting: granted,
		failed: func(err error) { done(-1, netip.AddrPort{}, err) }})
}

// serverAddr returns the endpoint at which the server was reached. A server on a unix socket is on this host.
func (p *dial) serverAddr() netip.AddrPort {
	if at := p.addrs[p.at]; at.IsValid() {
		return at
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p.hs.Bound().Port)
}
