package route

import (
	"context"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

type directUpstream struct {
	d       *socks.Dialer
	prepare func(fd int) error
}

// NewDirect returns the upstream named "direct": flows leave from sockets of this host, which must be steered past
// the TUN. For TCP sockets d's PrepareDirect is called, for UDP sockets prepare (nil: none) before they are used. The
// caller keeps d, and closes it after the Router.
func NewDirect(d *socks.Dialer, prepare func(fd int) error) Upstream {
	return &directUpstream{d, prepare}
}

// Name implements Upstream.
func (u *directUpstream) Name() string { return DirectName }

// DialStream implements Upstream by connect(2). d's Resolve looks up a name, on this host and past the TUN.
func (u *directUpstream) DialStream(ctx context.Context, l *relay.Loop, d Dest, done func(s loop.Socket, err error)) {
	if d.Name != "" {
		u.d.DialDirectName(ctx, l.Loop, d.Name, d.Addr.Port(), done)
		return
	}
	u.d.DialDirect(ctx, l.Loop, d.Addr, done)
}

// LookUp looks up a name on this host. done is called once, from any goroutine.
func (u *directUpstream) LookUp(ctx context.Context, name string, done func([]netip.Addr, error)) {
	u.d.LookUpDirect(ctx, name, done)
}

// OpenPackets implements Upstream with one UDP socket for both families, or for IPv4 if there is no IPv6.
func (u *directUpstream) OpenPackets(
	_ context.Context,
	l *relay.Loop,
	sink func([]flow.Packet),
	done func(relay.PacketLink, error),
	closed func(error),
) {
	fd, err := u.socket(unix.AF_INET6)
	if err == unix.EAFNOSUPPORT {
		fd, err = u.socket(unix.AF_INET)
	}
	if err != nil {
		done(nil, fmt.Errorf("cannot make a UDP socket: %w", err))
		return
	}
	done(l.OpenPackets(fd, nil, sink, closed))
}

func (u *directUpstream) socket(family int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return -1, err
	}
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if err == nil && u.prepare != nil {
		err = u.prepare(fd)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
