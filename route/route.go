package route

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
)

// Config of a Router.
type Config struct {
	Upstreams []Upstream // their names must differ; the one named "direct" is what the verdict direct means
	Rules     []Rule     // the first that matches decides
	Default   string     // the upstream of flows that no rule matches; "": they are refused

	Loops   []*relay.Loop // at least one; run by the caller, until after the Router was closed
	Sockets flow.Sockets  // nil: it can't be asked whether the app's sockets exist
	// Resolvers answer port 53, by DNS over TCP through the upstream that the rules give them. None: port 53 is a
	// port like others.
	Resolvers []netip.AddrPort
	Limits    Limits
	Log       *slog.Logger // nil: none
}

// Limits bound what the app can make us hold. Zero fields get the defaults.
type Limits struct {
	Flows        int // TCP flows, pending ones included; default 65,536, or what RLIMIT_NOFILE leaves
	Mappings     int // UDP mappings; default 8,192, or what RLIMIT_NOFILE leaves
	Associations int // that may be pending at a time; default 256
}

// Router takes flows from the stack, as its Handler, and has them carried.
type Router struct {
	cfg Config
	dns *dns.Server
}

// New checks the configuration. Nothing runs, and nothing is opened, until Run.
func New(cfg Config) (*Router, error) { return nil, errors.ErrUnsupported }

// Attach gives the Router what makes writers toward the app, one for each goroutine that needs one. It is called once,
// before the first packet.
func (r *Router) Attach(writer func() flow.PacketWriter) {}

// Run does the Router's own work until ctx ends or Close is called, then refuses new flows, resets those there are, closes
// the mappings, waits for all of it and returns nil. The loops must run until Run has returned. It may be called once.
func (r *Router) Run(ctx context.Context) error { return errors.ErrUnsupported }

// Close ends Run and waits for it. It may be called twice and from any goroutine.
func (r *Router) Close() error { return nil }

// HandleStream implements stack.Handler.
func (r *Router) HandleStream(req flow.StreamRequest) {}

// HandlePackets implements stack.Handler.
func (r *Router) HandlePackets(pkts []flow.Packet) {}

// HandleUnreachable ends the mapping of an app endpoint whose kernel answered a datagram with ICMP port unreachable.
// Called on the frame reader; it does not block.
func (r *Router) HandleUnreachable(endpoint netip.AddrPort) {}
