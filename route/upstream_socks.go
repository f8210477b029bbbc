package route

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Client carries the flows of a SOCKS upstream: one server (*socks.Client), or a group of servers (*socks.Group).
type Client interface {
	Connect(ctx context.Context, l *loop.Loop, dst socks.Addr, done func(s loop.Socket, err error))
	Associate(ctx context.Context, l *loop.Loop, done func(*socks.Association, error))
}

type socksUpstream struct {
	name string
	c    Client
}

// NewSOCKS returns an upstream of SOCKS servers. The caller keeps their Dialer, and closes it after the Router.
func NewSOCKS(name string, c Client) Upstream { return &socksUpstream{name, c} }

// Name implements Upstream.
func (u *socksUpstream) Name() string { return u.name }

// OnUp is Group.OnUp. A single server has no such event.
func (u *socksUpstream) OnUp(f func()) {
	if c, ok := u.c.(interface{ OnUp(func()) }); ok {
		c.OnUp(f)
	}
}

// ByProgram reports whether flows of different programs are kept apart. Their Dest must then name the program.
func (u *socksUpstream) ByProgram() bool {
	p, ok := u.c.(interface{ ByProgram() bool })
	return ok && p.ByProgram()
}

// Tor reports whether a server is a Tor, which knows .onion names.
func (u *socksUpstream) Tor() bool {
	t, ok := u.c.(interface{ Tor() bool })
	return ok && t.Tor()
}

// NamesUDP implements namesUpstream: SOCKS5's header of datagrams has room for a name, and so has the frame of UDP over TCP.
func (u *socksUpstream) NamesUDP() bool { return true }

// torUpstream is an Upstream whose server may be a Tor. AskTor asks for an address of name or, if that is empty, for the name of
// ip. It returns at once and calls done once, from any goroutine, perhaps before that.
type torUpstream interface {
	AskTor(ctx context.Context, l *relay.Loop, name string, ip netip.Addr, done func(netip.Addr, string, error))
}

// AskTor implements torUpstream.
func (u *socksUpstream) AskTor(ctx context.Context, l *relay.Loop, name string, ip netip.Addr,
	done func(netip.Addr, string, error)) {
	c, ok := u.c.(interface {
		Resolve(ctx context.Context, l *loop.Loop, name string, done func(netip.Addr, error))
		ResolvePTR(ctx context.Context, l *loop.Loop, ip netip.Addr, done func(name string, err error))
	})
	switch {
	case !ok:
		done(netip.Addr{}, "", socks.ErrCannotExpress)
	case name != "":
		c.Resolve(ctx, l.Loop, name, func(ip netip.Addr, err error) { done(ip, "", err) })
	default:
		c.ResolvePTR(ctx, l.Loop, ip, func(name string, err error) { done(netip.Addr{}, name, err) })
	}
}

// DialStream implements Upstream by CONNECT.
func (u *socksUpstream) DialStream(ctx context.Context, l *relay.Loop, d Dest, done func(s loop.Socket, err error)) {
	u.c.Connect(u.about(ctx, d), l.Loop, socks.Addr{Name: d.Name, IP: d.Addr.Addr(), Port: d.Addr.Port()}, done)
}

// about adds to ctx what the servers are chosen and the programs kept apart by.
func (u *socksUpstream) about(ctx context.Context, d Dest) context.Context {
	if h, ok := u.c.(interface{ BySource() bool }); ok && h.BySource() {
		ctx = socks.WithSource(ctx, d.Src)
	}
	if d.Program != "" {
		ctx = socks.WithIsolation(ctx, d.Program)
	}
	return ctx
}

// OpenPackets implements Upstream by UDP ASSOCIATE.
func (u *socksUpstream) OpenPackets(
	ctx context.Context,
	l *relay.Loop,
	sink func([]flow.Packet),
	done func(relay.PacketLink, error),
	closed func(error),
) {
	u.c.Associate(ctx, l.Loop, func(a *socks.Association, err error) {
		if err != nil {
			done(nil, err)
			return
		}
		if a.OverTCP() {
			u.openStream(l, a, sink, done, closed)
			return
		}
		fd, err := a.Dial()
		if err != nil {
			_ = a.Close()
			done(nil, err)
			return
		}
		names := &linkNames{}
		link, err := l.OpenPackets(fd, &codec{names: names}, sink, closed)
		if err != nil {
			_ = a.Close()
			done(nil, err)
			return
		}
		done(&socksLink{link, a, names}, nil)
		a.OnClose(closed)
	})
}

// openStream opens a link for the datagrams of a, which travel in its own connection. It is called on l's goroutine.
func (u *socksUpstream) openStream(l *relay.Loop, a *socks.Association, sink func([]flow.Packet),
	done func(relay.PacketLink, error), closed func(error)) {
	s := a.Stream()
	if s.FD() < 0 {
		_ = a.Close()
		done(nil, socks.ErrClosed)
		return
	}
	names := &linkNames{}
	link, err := l.OpenStreamPackets(s, &uotCodec{names: names}, socks.MaxUoTPayload, sink, func(err error) {
		_ = a.Close() // and OnClose is not told
		closed(&socks.ServerError{Server: a.Server(), Op: socks.OpAssociation, Err: err})
	})
	if err != nil {
		_ = a.Close()
		done(nil, err)
		return
	}
	done(&socksLink{link, a, names}, nil)
	a.OnClose(func(err error) { // its server went out of use, or the loop ends
		_ = link.Close()
		closed(err)
	})
}

// socksLink holds the association for as long as its datagrams are wanted.
type socksLink struct {
	relay.PacketLink
	a     *socks.Association
	names *linkNames
}

// Name implements namedLink.
func (l *socksLink) Name(fake netip.AddrPort, name string) { l.names.add(fake, name) }

// Server implements namedLink.
func (l *socksLink) Server() string { return l.a.Server() }

// Beside implements besideLink.
func (l *socksLink) Beside(n int) ([]*net.UDPConn, bool, error) { return l.a.Beside(n) }

// Listen implements besideLink.
func (l *socksLink) Listen() (*net.UDPConn, error) { return l.a.Listen() }

// Relay implements besideLink.
func (l *socksLink) Relay() netip.AddrPort { return l.a.Relay() }

// Close implements relay.PacketLink.
func (l *socksLink) Close() error { return errors.Join(l.PacketLink.Close(), l.a.Close()) }
