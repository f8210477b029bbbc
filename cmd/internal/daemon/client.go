package daemon

import (
	"context"
	"fmt"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
)

// client is the group of servers of an upstream, whose relays are allowed before they are used.
type client struct {
	*socks.Group
	allowed *endpoints // nil: sockets may go anywhere
}

var _ route.Client = (*client)(nil)

func newClient(d *socks.Dialer, l *loop.Loop, u config.Upstream, allowed *endpoints) (*client, error) {
	o := u.Group
	o.Name = u.Name
	g, err := d.Group(l, u.Servers(), o)
	if err != nil {
		return nil, fmt.Errorf("cannot use the upstream %s: %w", u.Name, err)
	}
	return &client{g, allowed}, nil
}

// Associate implements route.Client.
func (c *client) Associate(ctx context.Context, l *loop.Loop, done func(*socks.Association, error)) {
	if c.allowed == nil {
		c.Group.Associate(ctx, l, done)
		return
	}
	c.Group.Associate(ctx, l, func(a *socks.Association, err error) {
		if err != nil {
			done(nil, err)
			return
		}
		a.OnOver(c.allowed.relay(a.Server(), a.Relay(), func() { done(a, nil) }))
	})
}
