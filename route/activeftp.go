package route

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/ftp"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// ActiveFTP tells for which flows PORT and EPRT are rewritten: see package ftp. For each such command a BIND is made at
// the flow's upstream, and the server's connection is opened to the program.
type ActiveFTP struct {
	Ports []uint16 // of the servers' control connections
	// Open returns a request for a connection from peer to app, as stack.Open does.
	Open func(peer, app netip.AddrPort) flow.StreamRequest
}

const (
	// maxFTPBinds limits the BINDs of all control connections. A command over it is refused.
	maxFTPBinds = 256
	// leastFTPPort is the least port of a program that a server may connect to. What listens below is no FTP client.
	leastFTPPort = 1024
	// ftpListenTime is how long a command waits for its endpoint. Programs wait a minute or more for the answer to it.
	ftpListenTime = 30 * time.Second
	// ftpPeerTime is how long the BIND waits for the server. Programs have longer pauses only before the next command.
	ftpPeerTime = 5 * time.Minute
)

// activeFTP is the state of it for all shards.
type activeFTP struct {
	cfg   atomic.Pointer[ActiveFTP] // nil: nothing is rewritten
	binds atomic.Int64
}

// SetActiveFTP sets for which later flows PORT and EPRT are rewritten; nil: none. It may be called from any goroutine.
func (r *Router) SetActiveFTP(a *ActiveFTP) { r.tcp.ftp.cfg.Store(a) }

// binder is an Upstream that can let a server listen: see socks.Group.Bind.
type binder interface {
	BindStream(ctx context.Context, l *relay.Loop, d Dest, wait time.Duration, bound func(netip.AddrPort),
		done func(fd int, peer netip.AddrPort, err error))
}

// BindStream asks a server to listen for a connection from d, whatever its port.
func (u *socksUpstream) BindStream(ctx context.Context, l *relay.Loop, d Dest, wait time.Duration, bound func(netip.AddrPort),
	done func(fd int, peer netip.AddrPort, err error)) {
	c, ok := u.c.(interface {
		Bind(ctx context.Context, l *loop.Loop, dst socks.Addr, wait time.Duration, bound func(netip.AddrPort),
			done func(fd int, peer netip.AddrPort, err error))
	})
	if !ok {
		done(-1, netip.AddrPort{}, socks.ReplyCommandNotSupported)
		return
	}
	c.Bind(u.about(ctx, d), l.Loop, socks.Addr{Name: d.Name, IP: d.Addr.Addr()}, wait, bound, done)
}

// controlOrNot returns req, with its commands rewritten if it is a control connection of FTP.
func (s *stream) controlOrNot(req flow.StreamRequest) flow.StreamRequest {
	a := s.r.tcp.ftp.cfg.Load()
	if a == nil || !slices.Contains(a.Ports, s.flow.Dst.Port()) {
		return req
	}
	b, ok := s.v.up.Upstream.(binder)
	if !ok {
		return req
	}
	return ftp.Wrap(req, &ftpControl{a: a, r: s.r, l: s.r.loops[s.loop], up: b, flow: s.flow, dest: s.dest})
}

// ftpControl is a control connection. It implements ftp.Server.
type ftpControl struct {
	a    *ActiveFTP
	r    *shard
	l    *relay.Loop
	up   binder
	flow flow.Flow
	dest Dest

	mu     sync.Mutex
	over   bool
	cancel context.CancelFunc // of the last BIND
}

var _ ftp.Server = (*ftpControl)(nil)

// Mine implements ftp.Server.
func (c *ftpControl) Mine(at netip.AddrPort) bool {
	a := at.Addr()
	return at.Port() >= leastFTPPort && (a == c.flow.Src.Addr() || a == flow.TUN4 || a == flow.TUN6)
}

// Close implements ftp.Server.
func (c *ftpControl) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	if c.cancel != nil {
		c.cancel()
	}
}

// Listen implements ftp.Server. The BIND of an earlier command ends, since only the last one counts (RFC 959, section
// 4.1.2); the connection that came to it does not.
func (c *ftpControl) Listen(at netip.AddrPort, bound func(netip.AddrPort)) {
	all := &c.r.tcp.ftp.binds
	if all.Add(1) > maxFTPBinds {
		all.Add(-1)
		c.r.count.FTPRefused.Add(1)
		bound(netip.AddrPort{})
		return
	}
	ctx, cancel := context.WithCancel(c.r.ctx)
	c.mu.Lock()
	if c.cancel != nil {
		c.cancel()
	}
	if c.cancel = cancel; c.over {
		cancel()
	}
	c.mu.Unlock()
	late := time.AfterFunc(ftpListenTime, cancel)
	listens := false // both functions are called one after the other
	c.up.BindStream(ctx, c.l, c.dest, ftpPeerTime, func(outer netip.AddrPort) {
		late.Stop()
		listens = true
		c.r.count.FTPBound.Add(1)
		bound(outer)
	}, func(fd int, peer netip.AddrPort, err error) {
		late.Stop()
		cancel()
		all.Add(-1)
		switch {
		case err == nil:
			c.connected(at, peer, fd)
		case !listens:
			c.r.count.FTPRefused.Add(1)
			c.r.log.post(slog.LevelInfo, "cannot do active FTP: the proxy does not listen for the server",
				slog.Any("server", c.dest), slog.Any("err", err))
			bound(netip.AddrPort{})
		}
	})
}

// connected opens the server's connection to the program.
func (c *ftpControl) connected(at, peer netip.AddrPort, fd int) {
	from, ok := c.source(at.Addr(), netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()))
	if !ok {
		c.r.count.FTPBogus.Add(1)
		c.r.log.post(slog.LevelWarn, "the proxy accepted a connection for active FTP that is not the server's",
			slog.Any("server", c.dest), slog.Any("peer", peer))
		loop.CloseReset(fd)
		return
	}
	c.r.count.FTPConnected.Add(1)
	up := c.up.(Upstream).Name()
	err := c.r.Incoming(c.a.Open(from, at), up, "ftp-active", loop.Unwatched(fd), func(relay.Result) {})
	if err != nil {
		c.r.log.post(slog.LevelWarn, "cannot carry the connection of an FTP server", slog.Any("server", c.dest),
			slog.Any("peer", peer), slog.Any("err", err))
	}
}

// source returns the endpoint from which the program sees the connection of peer come: its own, or with the address by
// which the program knows the server if that is another one. It must have the family of the program's address.
func (c *ftpControl) source(app netip.Addr, peer netip.AddrPort) (from netip.AddrPort, ok bool) {
	known := c.flow.Dst.Addr()
	if peer.Port() == 0 || !flow.CanBePeer(peer.Addr()) {
		return from, false
	}
	if c.dest.Name == "" && peer.Addr() != known && peer.Addr().Is4() == known.Is4() {
		return from, false
	}
	from = peer
	if c.dest.Name != "" && known.Is4() == app.Is4() || peer.Addr().Is4() != app.Is4() {
		from = netip.AddrPortFrom(known, peer.Port())
	}
	return from, from.Addr().Is4() == app.Is4()
}
