package socks

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"
)

var errTODO = errors.New("not yet")

// Defaults of Options.
const (
	DefaultConnectTimeout   = 10 * time.Second
	DefaultHandshakeTimeout = 30 * time.Second
)

// Options of a Dialer. The zero value works.
type Options struct {
	Control          func(fd int) error
	DirectControl    func(fd int) error
	ConnectTimeout   time.Duration
	HandshakeTimeout time.Duration
	Log              *slog.Logger
	Resolve          func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Dialer makes connections through SOCKS servers.
type Dialer struct{ opts Options }

// NewDialer starts the event loop.
func NewDialer(o Options) (*Dialer, error) { return &Dialer{o}, nil }

// Close ends everything.
func (d *Dialer) Close() error { return nil }

// Client is one server seen through a Dialer.
type Client struct {
	d *Dialer
	s Server
}

// Client is s seen through d.
func (d *Dialer) Client(s Server) *Client { return &Client{d, s} }

// Connect sends a CONNECT.
func (c *Client) Connect(ctx context.Context, dst Addr, done func(fd int, err error)) {
	go done(-1, errTODO)
}

// Associate sends an UDP ASSOCIATE.
func (c *Client) Associate(ctx context.Context, done func(*Association, error)) {
	go done(nil, errTODO)
}

// DialDirect connects without a SOCKS server.
func (d *Dialer) DialDirect(ctx context.Context, dst netip.AddrPort, done func(fd int, err error)) {
	go done(-1, errTODO)
}

// Association is the state of an UDP ASSOCIATE.
type Association struct{ relay netip.AddrPort }

// Relay is the repaired relay address.
func (a *Association) Relay() netip.AddrPort { return a.relay }

// Dial opens a UDP socket connected to the relay.
func (a *Association) Dial() (fd int, err error) { return -1, errTODO }

// OnClose sets what is called when the control connection ended.
func (a *Association) OnClose(func(error)) {}

// Close ends the association.
func (a *Association) Close() error { return nil }
