package socks

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
)

// groupBind is a BIND that is asking the servers of a group.
type groupBind struct {
	wait  time.Duration
	bound func(netip.AddrPort)
	done  func(fd int, peer netip.AddrPort, err error)
}

// Bind is Client.Bind at the first server that can carry the request, with wait as the limit of the time until the peer
// comes. Once a server listens, no other one is asked.
func (g *Group) Bind(
	ctx context.Context,
	l *loop.Loop,
	dst Addr,
	wait time.Duration,
	bound func(netip.AddrPort),
	done func(fd int, peer netip.AddrPort, err error),
) {
	g.start(&run{g: g, l: l, ctx: ctx, dst: dst, bind: &groupBind{wait, bound, done}}, CmdBind)
}

// ask asks the server that was chosen.
func (b *groupBind) ask(r *run) {
	listens := false
	bound := func(at netip.AddrPort) {
		listens = true
		r.g.took(r, nil)
		b.bound(at)
	}
	r.g.clients[r.server].bind(r.ctx, r.l, r.dst, b.wait, bound, func(fd int, peer netip.AddrPort, err error) {
		var fault *ServerError
		switch {
		case err == nil || listens:
			b.done(fd, peer, err)
		case errors.As(err, &fault) && fault.Op == OpHandshake:
			// A server that does not know BIND may say nothing at all, which is nothing against its CONNECT.
			b.done(-1, netip.AddrPort{}, err)
		default:
			r.failed(r.g.took(r, err))
		}
	})
}
