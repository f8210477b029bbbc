package daemon

import (
	"context"
	"fmt"
	"reflect"
	"slices"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
)

// client is the group of servers of an upstream. It allows relays in the filter before they are used.
type client struct {
	*socks.Group
	via     *client    // the upstream through which its servers are reached; nil: directly
	allowed *endpoints // nil: sockets may go anywhere
}

var _ route.Client = (*client)(nil)

func newClient(d *socks.Dialer, l *loop.Loop, u config.Upstream, via *client, allowed *endpoints) (*client, error) {
	o := u.Group
	o.Name = u.Name
	if via != nil {
		o.Via = via
	}
	g, err := d.Group(l, u.Servers(), o)
	if err != nil {
		return nil, fmt.Errorf("cannot use the upstream %s: %w", u.Name, err)
	}
	return &client{g, via, allowed}, nil
}

// BySource is Group.BySource for the whole chain.
func (c *client) BySource() bool { return c.Group.BySource() || c.via != nil && c.via.BySource() }

// ByProgram is Group.ByProgram for the whole chain.
func (c *client) ByProgram() bool { return c.Group.ByProgram() || c.via != nil && c.via.ByProgram() }

// Associate implements route.Client.
func (c *client) Associate(ctx context.Context, l *loop.Loop, done func(*socks.Association, error)) {
	if c.allowed == nil {
		c.Group.Associate(ctx, l, done)
		return
	}
	c.Group.Associate(ctx, l, func(a *socks.Association, err error) {
		if err != nil || a.OverTCP() { // an association over TCP sends no datagrams to a relay
			done(a, err)
			return
		}
		a.OnOver(c.allowed.relay(a.Server(), a.Relay(), func() { done(a, nil) }))
	})
}

// builder makes the upstreams of a configuration, each after the one through which it is reached.
type builder struct {
	d       *socks.Dialer
	l       *loop.Loop // for trials and checks
	allowed *endpoints
	want    []config.Upstream
	have    []upstream // existing upstreams, which stay if they are made of the same as in want
	made    map[string]upstream
}

// all returns the upstreams of want, in order. On an error it closes those that it has made.
func (b *builder) all() (ups []upstream, err error) {
	b.made = map[string]upstream{}
	for _, u := range b.want {
		up, err := b.make(u)
		if err != nil {
			for _, x := range b.made {
				ups = append(ups, x)
			}
			closeGroups(ups, b.have)
			return nil, err
		}
		ups = append(ups, up)
	}
	return ups, nil
}

// make makes one upstream. The configuration has no cycles.
func (b *builder) make(u config.Upstream) (upstream, error) {
	if up, ok := b.made[u.Name]; ok {
		return up, nil
	}
	var via *client
	if u.Via != "" {
		i := slices.IndexFunc(b.want, func(w config.Upstream) bool { return w.Name == u.Via })
		if i < 0 {
			return upstream{}, fmt.Errorf("cannot use the upstream %s: there is no upstream %s", u.Name, u.Via)
		}
		up, err := b.make(b.want[i])
		if err != nil {
			return upstream{}, err
		}
		via = up.client
	}
	i := slices.IndexFunc(b.have, func(h upstream) bool {
		return h.client != nil && h.client.via == via && reflect.DeepEqual(h.Config, u)
	})
	if i >= 0 {
		b.made[u.Name] = b.have[i]
		return b.have[i], nil
	}
	c, err := newClient(b.d, b.l, u, via, b.allowed)
	if err != nil {
		return upstream{}, err
	}
	up := upstream{u, route.NewSOCKS(u.Name, c), c}
	b.made[u.Name] = up
	return up, nil
}

// clientOf returns the client of the upstream called name, or nil.
func clientOf(ups []upstream, name string) *client {
	if i := slices.IndexFunc(ups, func(u upstream) bool { return u.Config.Name == name }); i >= 0 {
		return ups[i].client
	}
	return nil
}

// closeGroups closes the groups of ups, except those that are also in keep.
func closeGroups(ups, keep []upstream) {
	for _, u := range ups {
		if u.client != nil && !slices.ContainsFunc(keep, func(k upstream) bool { return k.client == u.client }) {
			u.client.Close()
		}
	}
}
