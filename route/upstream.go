package route

import (
	"cmp"
	"context"
	"net/netip"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Dest is the destination of a TCP flow. If Name is set, it takes precedence and travels to the proxy as a name.
type Dest struct {
	Addr netip.AddrPort
	Name string
	Src  netip.Addr // the app's address, for upstreams that use it to choose a server
	// SrcPort is the app's port. It does not influence any choice.
	SrcPort uint16

	// Sniffed is the name found in the app's first bytes. Rules and status use it; it travels only as Name.
	Sniffed string

	// Program identifies the app's program and user. It is set for upstreams that separate programs (ByProgram), and
	// empty if the program could not be found.
	Program string
}

// host returns the name that the app means, as far as it is known.
func (d Dest) host() string { return cmp.Or(d.Name, d.Sniffed) }

func (d Dest) String() string {
	if d.Name != "" {
		return d.Name
	}
	return d.Addr.String()
}

// Upstream carries flows. Its methods return at once and may be called from any goroutine. done is called exactly
// once, from any goroutine, possibly before the method returns, and must not block. Cancelling ctx ends what is
// pending, with an error to done.
type Upstream interface {
	Name() string

	// DialStream opens a TCP connection to d, on l. s is connected and non-blocking, and the receiver owns it. done
	// is called on l's goroutine if l watches s, as it does for a SOCKS server. The errors that socks documents, and
	// an errno of connect(2) if there is no SOCKS server, determine the app's error. A *loop.Call is the cheapest
	// ctx.
	DialStream(ctx context.Context, l *relay.Loop, d Dest, done func(s loop.Socket, err error))

	// OpenPackets opens a socket for datagrams from one app endpoint to any destination, on l. sink gets the
	// datagrams that come back, on l's goroutine, in bursts that are valid only during the call, with Src set and Dst
	// not. The receiver of the link closes it. closed is called at most once, and only if an open link has failed for
	// good: the control connection ended, or the socket failed. It may be called before done.
	OpenPackets(
		ctx context.Context,
		l *relay.Loop,
		sink func([]flow.Packet),
		done func(relay.PacketLink, error),
		closed func(error),
	)
}
