package route

import (
	"context"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// answers is the upstream of TCP connections to port 53 whose questions are examined: route/dns itself answers them,
// at the other end of a socket pair.
type answers struct{ r *port53 }

// answersName appears in the log and the list of flows.
const answersName = "dns"

// newAnswers returns the verdict on such connections. Its upstream belongs to no policy, and none replaces it.
func newAnswers(r *port53) *verdict {
	return &verdict{rule: "dns", up: &upstream{Upstream: answers{r}, name: answersName, own: true, count: new(upstreamCounters)}}
}

// Name implements Upstream.
func (answers) Name() string { return answersName }

// DialStream implements Upstream.
func (a answers) DialStream(_ context.Context, _ *relay.Loop, d Dest, done func(s loop.Socket, err error)) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		done(loop.NoSocket, err)
		return
	}
	src := netip.AddrPortFrom(d.Src, d.SrcPort)
	s := a.r.server.Load()
	s.ServeTCP(fds[1], serverAsked(s, d.Addr), a.r.judgeOf(flow.Flow{Proto: flow.TCP, Src: src, Dst: d.Addr}), func(b []byte) {
		if a.r.wantsNames() {
			a.r.names.learn(b, a.r.now())
		}
	})
	done(loop.Unwatched(fds[0]), nil)
}

// OpenPackets implements Upstream. It fails, because datagrams to port 53 reach route/dns without an upstream.
func (answers) OpenPackets(
	_ context.Context,
	_ *relay.Loop,
	_ func([]flow.Packet),
	done func(relay.PacketLink, error),
	_ func(error),
) {
	done(nil, unix.ENETUNREACH)
}
