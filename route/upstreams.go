package route

import (
	"context"
	"errors"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

type socksUpstream struct {
	name string
	c    *socks.Client
}

// NewSOCKS is an upstream of one SOCKS server. c's Dialer stays the caller's, who closes it after the Router.
func NewSOCKS(name string, c *socks.Client) Upstream { return &socksUpstream{name, c} }

func (u *socksUpstream) Name() string { return u.name }

func (u *socksUpstream) DialStream(ctx context.Context, d Dest, done func(fd int, err error)) {
	u.c.Connect(ctx, socks.Addr{Name: d.Name, IP: d.Addr.Addr(), Port: d.Addr.Port()}, done)
}

func (u *socksUpstream) OpenPackets(ctx context.Context, l *relay.Loop, sink func([]flow.Packet), done func(relay.PacketLink, error), closed func(error)) {
	done(nil, errors.ErrUnsupported)
}

// NewDirect is the upstream named "direct": flows leave by this host, from sockets that the Dialer marks. control is
// called with each new UDP socket before it is used; nil: no.
func NewDirect(d *socks.Dialer, control func(fd int) error) Upstream { return nil }
