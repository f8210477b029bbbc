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

// Defaults of Options.
const (
	DefaultConnectTimeout   = 10 * time.Second
	DefaultHandshakeTimeout = 30 * time.Second
)

// Options of a Dialer. The zero value works.
type Options struct {
	// Control is called with each socket to a server, TCP and UDP, before it is connected: to set a mark. It runs on the
	// event loop or on the caller's goroutine of Association.Dial and must not block. An error ends the dial.
	Control func(fd int) error
	// DirectControl is Control for DialDirect; nil: Control is used.
	DirectControl func(fd int) error

	// ConnectTimeout is for reaching the server, looking up its name and trying all its addresses included. Zero: 10 s.
	ConnectTimeout time.Duration
	// HandshakeTimeout is for the whole handshake from then on: bytes that drip in do not extend it. Zero: 30 s.
	HandshakeTimeout time.Duration

	// CanBePeer reports whether datagrams may be sent to an address that a server names as its relay. It is not asked about
	// the server's own address. nil: to all that are of one host.
	CanBePeer func(netip.Addr) bool

	// Log gets debug messages; nil: nobody does.
	Log *slog.Logger
	// Resolve looks up servers' names; nil: net.DefaultResolver. It is called on a goroutine of its own, one for each
	// server at a time, and must return when ctx ends.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Dialer makes connections through SOCKS servers. It has no goroutine but while a server's name is looked up: a dial, and
// the control connection of an association, live on the loop that they are given. Its methods may be called from any
// goroutine.
type Dialer struct {
	opts Options
	log  *slog.Logger
	base time.Time

	bindTimeout time.Duration // DefaultBindTimeout but in tests

	ctx     context.Context // ends look-ups
	cancel  context.CancelFunc
	mu      sync.Mutex // over closed and the start of look-ups
	closed  atomic.Bool
	lookups sync.WaitGroup

	names                            atomic.Int64 // look-ups of DialDirectName
	tuning                           atomic.Pointer[Tuning]
	pending, assocs, pooled          atomic.Int64
	connectTimeout, handshakeTimeout atomic.Int64 // ns
}

// NewDialer checks the options. The caller closes the Dialer.
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
	if o.DirectControl == nil {
		o.DirectControl = o.Control
	}
	d := &Dialer{opts: o, log: o.Log, base: time.Now(), bindTimeout: DefaultBindTimeout}
	d.SetTimeouts(o.ConnectTimeout, o.HandshakeTimeout)
	d.Tune(Tuning{})
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

// SetTimeouts changes ConnectTimeout and HandshakeTimeout for what begins from now on. As in Options, zero means the default.
func (d *Dialer) SetTimeouts(connect, handshake time.Duration) {
	d.connectTimeout.Store(int64(cmp.Or(connect, DefaultConnectTimeout)))
	d.handshakeTimeout.Store(int64(cmp.Or(handshake, DefaultHandshakeTimeout)))
}

// Close refuses new dials with ErrClosed, ends look-ups and returns when that is done. What is under way on a loop ends with
// the loop, which is closed first, or by itself. Sockets that were handed out are not touched. It may be called twice, but not
// from a callback of this Dialer.
func (d *Dialer) Close() error {
	d.mu.Lock()
	d.closed.Store(true)
	d.mu.Unlock()
	d.cancel()
	d.lookups.Wait()
	return nil
}

// now is the clock of groups, monotonic: the time since the Dialer was made.
func (d *Dialer) now() time.Duration { return time.Since(d.base) }

// Stats is how much a Dialer has under way.
type Stats struct {
	Pending      int // dials, direct ones and those of associations included
	Associations int // open ones
	Pooled       int // connections that wait in a pool
}

// Stats is a snapshot.
func (d *Dialer) Stats() Stats {
	return Stats{Pending: int(d.pending.Load()), Associations: int(d.assocs.Load()), Pooled: int(d.pooled.Load())}
}

// Client is one server seen through a Dialer. Its methods may be called from any goroutine.
type Client struct {
	d      *Dialer
	server Server
	fixed  []netip.AddrPort // the address, when the server is given by one; for a unix socket no address
	tls    *tls.Config      // nil: none
	names  lookup
	pipe   pipelining

	shelves sync.Map // *loop.Loop to *shelf
	noPool  atomic.Bool

	// Of a group: what its servers are reached through, and times other than the Dialer's.
	via                              Connector
	connectTimeout, handshakeTimeout time.Duration
}

func (c *Client) connectTime() time.Duration {
	return cmp.Or(c.connectTimeout, time.Duration(c.d.connectTimeout.Load()))
}

func (c *Client) handshakeTime() time.Duration {
	return cmp.Or(c.handshakeTimeout, time.Duration(c.d.handshakeTimeout.Load()))
}

// Client is s seen through d. Clients of one server each keep its addresses for themselves: make one and share it.
func (d *Dialer) Client(s Server) *Client {
	c := &Client{d: d, server: s}
	if s.tls {
		c.tls = s.tlsConfig()
	}
	if s.path != "" {
		c.fixed = make([]netip.AddrPort, 1) // one attempt, at no address
	} else if ip, ok := s.addr(); ok {
		c.fixed = []netip.AddrPort{netip.AddrPortFrom(ip, s.port)}
	}
	return c
}

// Server is the server that c speaks to.
func (c *Client) Server() Server { return c.server }

// Connect asks the server for a connection to dst and returns at once. done is called exactly once, on the goroutine of l (it
// must not block) or, when l or the Dialer is closed, on another goroutine: with a connected, non-blocking, close-on-exec
// socket, which l watches already, which the receiver owns and from which nothing behind the reply was read, or with
// loop.NoSocket and an error (see the package comment for the kinds). When ctx ends first, the socket is closed and done gets
// ctx.Err(). A *loop.Call is the cheapest ctx: another one costs some allocations for each dial, and one that is not of
// package context a goroutine.
func (c *Client) Connect(ctx context.Context, l *loop.Loop, dst Addr, done func(s loop.Socket, err error)) {
	c.d.start(&dial{d: c.d, l: l, c: c, ctx: ctx, cmd: CmdConnect, dst: dst, done: done})
}

// Associate asks the server for an association, whose control connection l keeps, and returns at once. done is called as by
// Connect, with an Association that the receiver must Close. With udp=over-tcp it asks for UDP over TCP instead, by
// CONNECT: see Association.Stream. DST is all zeros, since our own endpoint is not known before the
// relay is (RFC 1928, section 4); its family is that of the control connection, and then the other one if the server refuses
// that with reply 8.
func (c *Client) Associate(ctx context.Context, l *loop.Loop, done func(*Association, error)) {
	p := &dial{d: c.d, l: l, c: c, ctx: ctx, cmd: CmdAssociate, assocDone: done}
	if c.server.options.uot {
		p.cmd, p.dst = CmdConnect, Addr{Name: uotName}
	}
	c.d.start(p)
}

// DialDirect connects to dst without a server. done is called as by Connect; an error wraps the errno, or ErrSilent when
// dst did not answer for as long as the kernel tried.
func (d *Dialer) DialDirect(ctx context.Context, l *loop.Loop, dst netip.AddrPort, done func(s loop.Socket, err error)) {
	d.start(&dial{d: d, l: l, ctx: ctx, dst: AddrFrom(dst), done: done})
}
