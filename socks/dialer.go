package socks

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
)

// Default values of Options.
const (
	DefaultConnectTimeout   = 10 * time.Second
	DefaultHandshakeTimeout = 30 * time.Second
)

// Options are the options of a Dialer. The zero value can be used.
type Options struct {
	// PrepareSocket is called with each TCP and UDP socket to a server before it is connected, for example to set a mark.
	// It is called on the event loop, or on the goroutine that called Association.Dial, and must not block. An error
	// ends the dial.
	PrepareSocket func(fd int) error
	// PrepareDirect is PrepareSocket for DialDirect. If it is nil, PrepareSocket is used.
	PrepareDirect func(fd int) error

	// ConnectTimeout is the time for reaching the server. It includes looking up the server's name and trying all of
	// its addresses. Zero means 10 s.
	ConnectTimeout time.Duration
	// HandshakeTimeout is the time for the whole handshake after that. Bytes that arrive slowly do not extend it.
	// Zero means 30 s.
	HandshakeTimeout time.Duration

	// CanBePeer reports whether datagrams may be sent to an address that a server names as its relay. It is not
	// called for the server's own address. If it is nil, every unicast address is allowed.
	CanBePeer func(netip.Addr) bool

	// Log receives debug messages. If it is nil, there are none.
	Log *slog.Logger
	// Resolve looks up the names of servers. If it is nil, net.DefaultResolver is used. It is called on its own
	// goroutine, at most one for each server at a time, and must return when ctx ends.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Dialer makes connections through SOCKS servers. It uses a goroutine only while a server's name is looked up: a dial
// and the control connection of an association live on the event loop that the caller chose. Its methods may be
// called from any goroutine.
type Dialer struct {
	opts Options
	log  *slog.Logger
	base time.Time

	bindTimeout time.Duration // DefaultBindTimeout except in tests

	ctx     context.Context // ends look-ups
	cancel  context.CancelFunc
	mu      sync.Mutex // guards closed and the start of look-ups
	closed  atomic.Bool
	lookups sync.WaitGroup

	names                            atomic.Int64 // running look-ups of DialDirectName
	tuning                           atomic.Pointer[Tuning]
	pending, assocs, pooled          atomic.Int64
	connectTimeout, handshakeTimeout atomic.Int64 // ns
}

// NewDialer returns a Dialer, or an error if an option is invalid. The caller closes the Dialer.
func NewDialer(o Options) (*Dialer, error) {
	if o.ConnectTimeout < 0 || o.HandshakeTimeout < 0 {
		return nil, errors.New("cannot use a negative timeout for SOCKS servers")
	}
	if o.Resolve == nil {
		o.Resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return LookupAddrs(ctx, net.DefaultResolver, host)
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.CanBePeer == nil {
		o.CanBePeer = func(a netip.Addr) bool { return scope(a) > scopeNone }
	}
	if o.PrepareDirect == nil {
		o.PrepareDirect = o.PrepareSocket
	}
	d := &Dialer{opts: o, log: o.Log, base: time.Now(), bindTimeout: DefaultBindTimeout}
	d.SetTimeouts(o.ConnectTimeout, o.HandshakeTimeout)
	d.Tune(Tuning{})
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

// SetTimeouts changes ConnectTimeout and HandshakeTimeout for dials that begin later. As in Options, zero means the
// default.
func (d *Dialer) SetTimeouts(connect, handshake time.Duration) {
	d.connectTimeout.Store(int64(cmp.Or(connect, DefaultConnectTimeout)))
	d.handshakeTimeout.Store(int64(cmp.Or(handshake, DefaultHandshakeTimeout)))
}

// Close makes new dials fail with ErrClosed, ends look-ups and waits until they have returned. Dials on a loop end
// when the loop is closed, which must happen first, or by themselves. Sockets that were handed out are not touched.
// Close may be called twice, but not from a callback of this Dialer.
func (d *Dialer) Close() error {
	d.mu.Lock()
	d.closed.Store(true)
	d.mu.Unlock()
	d.cancel()
	d.lookups.Wait()
	return nil
}

// now is the monotonic clock of groups: the time since the Dialer was made.
func (d *Dialer) now() time.Duration { return time.Since(d.base) }

// Stats counts what a Dialer holds.
type Stats struct {
	// Includes direct dials and those of associations.
	Pending      int `metric:"dials_pending" help:"Dials that are under way."`
	Associations int `metric:"associations" help:"Associations that are open."`
	Pooled       int `metric:"pooled_connections" help:"Connections to SOCKS servers that wait in a pool."`
}

// Stats returns a snapshot.
func (d *Dialer) Stats() Stats {
	return Stats{Pending: int(d.pending.Load()), Associations: int(d.assocs.Load()), Pooled: int(d.pooled.Load())}
}

// Client is one server, used through a Dialer. Its methods may be called from any goroutine.
type Client struct {
	d      *Dialer
	server Server
	fixed  []netip.AddrPort // the address if the server is given by address; one invalid entry for a unix socket
	tls    *tls.Config      // nil: no TLS
	names  lookup
	pipe   pipelining
	count  clientCounters

	shelves sync.Map // *loop.Loop to *shelf
	noPool  atomic.Bool

	// Set by a group: what its servers are reached through, and timeouts that differ from the Dialer's.
	via                              Connector
	connectTimeout, handshakeTimeout time.Duration
}

func (c *Client) connectTime() time.Duration {
	return cmp.Or(c.connectTimeout, time.Duration(c.d.connectTimeout.Load()))
}

func (c *Client) handshakeTime() time.Duration {
	return cmp.Or(c.handshakeTimeout, time.Duration(c.d.handshakeTimeout.Load()))
}

// Client returns a Client for s. Each Client keeps its own list of the server's addresses, so make one for each
// server and share it.
func (d *Dialer) Client(s Server) *Client {
	c := &Client{d: d, server: s}
	if s.tls {
		c.tls = s.tlsConfig()
	}
	if s.path != "" {
		c.fixed = make([]netip.AddrPort, 1) // one attempt, without an address
	} else if ip, ok := s.addr(); ok {
		c.fixed = []netip.AddrPort{netip.AddrPortFrom(ip, s.port)}
	}
	return c
}

// Server returns the server that c uses.
func (c *Client) Server() Server { return c.server }

// Connect asks the server for a connection to dst and returns at once. done is called exactly once: on the goroutine
// of l, where it must not block, or on another goroutine if l or the Dialer is closed. On success s is a connected,
// non-blocking, close-on-exec socket that l already watches. The receiver owns it, and no byte after the reply was
// read from it. On failure s is loop.NoSocket; the package comment lists the kinds of errors. If ctx ends first, the
// socket is closed and the error is ctx.Err(). A *loop.Call is the cheapest ctx: any other costs some allocations for
// each dial, and one that does not come from package context costs a goroutine.
func (c *Client) Connect(ctx context.Context, l *loop.Loop, dst Addr, done func(s loop.Socket, err error)) {
	c.d.start(&dial{d: c.d, l: l, c: c, ctx: ctx, cmd: CmdConnect, dst: dst, done: done})
}

// Associate asks the server for an association, whose control connection lives on l, and returns at once. done is
// called as by Connect, with an Association that the receiver must Close. For a server with udp=over-tcp, Associate
// asks for UDP over TCP by CONNECT instead: see Association.Stream. DST is all zeros, because our own endpoint is not
// known before the relay is (RFC 1928, section 4). Its family is that of the control connection; if the server
// refuses it with reply 8, the other family is tried.
func (c *Client) Associate(ctx context.Context, l *loop.Loop, done func(*Association, error)) {
	p := &dial{d: c.d, l: l, c: c, ctx: ctx, cmd: CmdAssociate, assocDone: done}
	if c.server.options.uot {
		p.cmd, p.dst = CmdConnect, Addr{Name: uotName}
	}
	c.d.start(p)
}

// DialDirect connects to dst without a server. done is called as by Connect. The error wraps the errno, or is
// ErrSilent if dst did not answer for as long as the kernel tried.
func (d *Dialer) DialDirect(ctx context.Context, l *loop.Loop, dst netip.AddrPort, done func(s loop.Socket, err error)) {
	d.start(&dial{d: d, l: l, ctx: ctx, dst: AddrFrom(dst), done: done})
}
