package daemon

import (
	"context"
	"sync/atomic"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
)

// client is a SOCKS server whose relays are allowed before they are used, and whose name can be looked up anew.
type client struct {
	d       *socks.Dialer
	server  socks.Server
	allowed *endpoints // nil: sockets may go anywhere
	now     atomic.Pointer[socks.Client]
}

var _ route.Client = (*client)(nil)

func newClient(d *socks.Dialer, s socks.Server, allowed *endpoints) *client {
	c := &client{d: d, server: s, allowed: allowed}
	c.renew()
	return c
}

// renew forgets what the server's name stood for. What is pending goes on.
func (c *client) renew() { c.now.Store(c.d.Client(c.server)) }

// Connect implements route.Client.
func (c *client) Connect(ctx context.Context, l *loop.Loop, dst socks.Addr, done func(s loop.Socket, err error)) {
	c.now.Load().Connect(ctx, l, dst, done)
}

// Associate implements route.Client.
func (c *client) Associate(ctx context.Context, l *loop.Loop, done func(*socks.Association, error)) {
	if c.allowed == nil {
		c.now.Load().Associate(ctx, l, done)
		return
	}
	c.now.Load().Associate(ctx, l, func(a *socks.Association, err error) {
		if err != nil {
			done(nil, err)
			return
		}
		a.OnOver(c.allowed.relay(c.server.String(), a.Relay(), func() { done(a, nil) }))
	})
}
