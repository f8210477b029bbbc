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

// DefaultBindTimeout is how long a BIND waits for its peer: as long as the kernel tries to connect, and some more.
const DefaultBindTimeout = 3 * time.Minute

// ErrNoPeer: no peer connected to what BIND had opened in time.
var ErrNoPeer = fmt.Errorf("no peer connected: %w", os.ErrDeadlineExceeded)

var errNoPort = errors.New("it names no port")

// Bind asks the server to listen for one connection from dst, of which servers compare the address (zeros: from anybody), and
// returns at once (RFC 1928, section 4; SOCKS4 has it too). bound is called when the server listens, with the endpoint that
// the peer must be told, repaired as that of an association is; then done when the peer has connected, with a socket as by
// Connect and the peer. Where it fails done is called with -1 and an error, as by Connect, at whatever stage: bound may then
// never be called. ErrNoPeer: DefaultBindTimeout is over. Both are called on the event loop and must not block.
func (c *Client) Bind(
	ctx context.Context,
	l *loop.Loop,
	dst Addr,
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
		p.l.SetTimer(&p.Node, p.l.Now()+p.d.bindTimeout)
		bound(at)
		if p.state == waiting { // bound may have cancelled
			p.shake()
		}
	}
	c.d.start(&dial{d: c.d, l: l, c: c, ctx: ctx, cmd: CmdBind, dst: dst, granting: granted,
		failed: func(err error) { done(-1, netip.AddrPort{}, err) }})
}

// serverAddr is the endpoint that the server was reached at. One on a unix socket is on this host.
func (p *dial) serverAddr() netip.AddrPort {
	if at := p.addrs[p.at]; at.IsValid() {
		return at
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p.hs.Bound().Port)
}
