package route

import (
	"cmp"
	"context"
	"net/netip"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Dest is where a TCP flow goes. Name wins when it is set: it travels to the proxy as a name.
type Dest struct {
	Addr netip.AddrPort
	Name string
	Src  netip.Addr // the app's address, for upstreams that choose a server by it
	// SrcPort is the app's port. Nothing is chosen by it.
	SrcPort uint16

	// Sniffed is the name that the app said in its first bytes. Rules and status know it; it travels only as Name.
	Sniffed string

	// Program stands for the app's program and user. It is set for upstreams that keep programs apart (ByProgram), and empty
	// where the program could not be found.
	Program string
}

// host is the name that the app means, as far as it is known.
func (d Dest) host() string { return cmp.Or(d.Name, d.Sniffed) }

func (d Dest) String() string {
	if d.Name != "" {
		return d.Name
	}
	return d.Addr.String()
}

// Upstream is what carries flows. Its methods return at once and may be called from any goroutine; done is called
// exactly once, from any goroutine, perhaps before the method returns, and must not block. Cancelling ctx ends what is
// pending, with an error to done.
type Upstream interface {
	Name() string

	// DialStream opens a TCP connection to d, on l. s is connected and non-blocking, and the receiver's. done is called on
	// l's goroutine if s is watched by l, as that of a SOCKS server is. The errors that socks documents, and an errno of
	// connect(2) where there is no SOCKS server, become the app's error. A *loop.Call is the cheapest ctx.
	DialStream(ctx context.Context, l *relay.Loop, d Dest, done func(s loop.Socket, err error))

	// OpenPackets opens a socket for datagrams from one app endpoint to any destination, on l. sink gets what comes
	// back, on l's goroutine, in bursts that are lent for the call, with Src set and Dst not. The receiver of the link
	// closes it. closed is called at most once, and only when an open link has failed for good: the control
	// connection ended, or the socket failed. It may come before done.
	OpenPackets(ctx context.Context, l *relay.Loop, sink func([]flow.Packet), done func(relay.PacketLink, error), closed func(error))
}
