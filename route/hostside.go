package route

import (
	"context"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// A program in its own network namespace may be allowed to reach services on the loopback addresses of the host. It
// finds them at the far end of the TUN: at flow.Gateway4, flow.Gateway6, and by HostServiceName.

const (
	// HostServiceName is the name of the host for such a program.
	HostServiceName = "host.viasocks.internal"
	// HostUpstream is the name of the upstream that carries these flows, for the log and the list of flows.
	HostUpstream = "host"
	// hostRule stands for the rule that decided on them.
	hostRule = "reach-host"
)

// HostServices tells which services on the loopback addresses of the host may be reached.
type HostServices struct {
	Allows func(port uint16) bool // called for each new flow, from any goroutine
	Dialer *socks.Dialer          // makes the connections; the caller closes it after the Router
	NoIPv6 bool                   // HostServiceName has no IPv6 address, because the program has no IPv6
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()

	// hostNames are the names of the host in the eyes of the rules. The slice never changes.
	hostNames = []string{HostServiceName}

	errNotReached = errors.New("--reach-host does not name this port")
)

// hostSide is what a Router with HostServices has.
type hostSide struct {
	HostServices
	reach   *verdict // to a port that may be reached
	refused *verdict // to any other port
}

func newHostSide(s *HostServices) *hostSide {
	if s == nil {
		return nil
	}
	h := &hostSide{HostServices: *s, refused: &verdict{kind: reject, rule: hostRule}}
	up := &upstream{Upstream: hostUpstream{s.Dialer}, name: HostUpstream, own: true, count: new(upstreamCounters)}
	h.reach = &verdict{up: up, rule: hostRule}
	return h
}

// isHost reports whether a is where a program finds the host. h may be nil.
func (h *hostSide) isHost(a netip.Addr) bool {
	return h != nil && (a == flow.Gateway4 || a == flow.Gateway6)
}

// verdictOn returns the verdict on a flow to the host. A rule that refuses it wins. No other rule matters, because no
// upstream could carry it. Port 53 is never reached there: it is where route/dns answers.
func (h *hostSide) verdictOn(p *policy, q *query) *verdict {
	q.names = hostNames
	v := p.decide(q)
	switch {
	case v.kind == await, v != p.otherwise && v.kind != carry:
		return v
	case q.dst.Port() == 53 || !h.Allows(q.dst.Port()):
		return h.refused
	}
	return h.reach
}

// ownName returns the name that route/dns answers for. h may be nil.
func (h *hostSide) ownName() (n dns.OwnName) {
	if h == nil {
		return n
	}
	n = dns.OwnName{Name: HostServiceName, V4: flow.Gateway4}
	if !h.NoIPv6 {
		n.V6 = flow.Gateway6
	}
	return n
}

// own returns the upstreams that belong to the Router itself and are shown like others.
func (h *hostSide) own() []*upstream {
	if h == nil {
		return nil
	}
	return []*upstream{h.reach.up}
}

// hostUpstream connects to the loopback addresses of this host, and to nothing else.
type hostUpstream struct{ d *socks.Dialer }

// Name implements Upstream.
func (hostUpstream) Name() string { return HostUpstream }

// loopbacks returns the addresses to try for a flow to a: first the one of its family, because a service may listen at one of
// them only, and different services may listen at one port of both.
func loopbacks(a netip.Addr) [2]netip.Addr {
	if a.Is4() {
		return [2]netip.Addr{loopback4, loopback6}
	}
	return [2]netip.Addr{loopback6, loopback4}
}

// nobodyListens reports whether err means that another loopback address should be tried.
func nobodyListens(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENETUNREACH) ||
		errors.Is(err, unix.EAFNOSUPPORT)
}

// DialStream implements Upstream. The error is that of the first address, which is the one that the program meant.
func (u hostUpstream) DialStream(ctx context.Context, l *relay.Loop, d Dest, done func(s loop.Socket, err error)) {
	at := loopbacks(d.Addr.Addr())
	u.d.DialDirect(ctx, l.Loop, netip.AddrPortFrom(at[0], d.Addr.Port()), func(s loop.Socket, first error) {
		if first == nil || !nobodyListens(first) || ctx.Err() != nil {
			done(s, first)
			return
		}
		u.d.DialDirect(ctx, l.Loop, netip.AddrPortFrom(at[1], d.Addr.Port()), func(s loop.Socket, err error) {
			if err != nil && nobodyListens(err) {
				err = first
				if errors.Is(first, unix.EADDRNOTAVAIL) || errors.Is(first, unix.ENETUNREACH) ||
					errors.Is(first, unix.EAFNOSUPPORT) {
					err = unix.ECONNREFUSED // this host has no IPv6, which the program need not know
				}
			}
			done(s, err)
		})
	})
}

// OpenPackets implements Upstream.
func (u hostUpstream) OpenPackets(
	_ context.Context,
	l *relay.Loop,
	sink func([]flow.Packet),
	done func(relay.PacketLink, error),
	_ func(error),
) {
	done(newHostLink(l, sink), nil)
}

// whyRejected returns the reason for the verdict reject, for the log; nil: the rule says it all.
func (r *decider) whyRejected(v *verdict) error {
	switch {
	case v.rule == noRule:
		return errNoRule
	case r.host != nil && v == r.host.refused:
		return errNotReached
	}
	return nil
}
