package conform

import (
	"context"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/socks"
)

// zero returns the unspecified address of the family by which the relay was first reached.
func (p *prober) zero() netip.Addr {
	if at, err := netip.ParseAddrPort(p.report.UDP.Relay); err == nil && at.Addr().Is6() && !at.Addr().Is4In6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// mapping asks three sockets of the far end where they see the association (RFC 5780, section 4.3).
func (p *prober) mapping(ctx context.Context) NAT {
	a, _, _ := p.associate(ctx, p.zero())
	if a == nil {
		return UnknownNAT
	}
	defer a.close()
	var seen [3]netip.AddrPort
	for i, at := range []netip.AddrPort{p.Ends.UDP[0][0], p.Ends.UDP[0][1], p.Ends.UDP[1][0]} {
		if i == 2 && !at.IsValid() { // the far end has one address, so two ports must do
			seen[2] = seen[0]
			break
		}
		e := a.exchange(ctx, socks.AddrFrom(at), [2]int{}, 0, 0, udpTries)
		if e == nil {
			return UnknownNAT
		}
		seen[i] = e.seen
	}
	switch {
	case seen[0] != seen[1]:
		return PortDependent
	case seen[0] != seen[2]:
		return AddressDependent
	}
	return EndpointIndependent
}

// filtering lets the answer come from a socket that was not written to (RFC 5780, section 4.4).
func (p *prober) filtering(ctx context.Context) NAT {
	for _, try := range []struct {
		from [2]int
		if_  NAT
	}{{[2]int{1, 1}, EndpointIndependent}, {[2]int{0, 1}, AddressDependent}, {[2]int{0, 0}, PortDependent}} {
		if try.from[0] == 1 && !p.Ends.UDP[1][1].IsValid() {
			continue
		}
		a, _, _ := p.associate(ctx, p.zero()) // a new one, which has written to no other socket
		if a == nil {
			return UnknownNAT
		}
		e := a.exchange(ctx, socks.AddrFrom(p.Ends.UDP[0][0]), try.from, 0, 0, udpTries)
		a.close()
		if e != nil {
			return try.if_
		}
	}
	return UnknownNAT
}

// largest finds the largest payload that arrives whole, and the length to which larger ones are cut (0: they do not
// arrive).
func (p *prober) largest(ctx context.Context, up bool) (size, cut int) {
	var a *association
	defer func() {
		if a != nil {
			a.close()
		}
	}()
	const tries = 2
	arrives := func(n int) bool {
		if a != nil && a.ended() {
			a.close()
			a = nil
		}
		if a == nil {
			if a, _, _ = p.associate(ctx, p.zero()); a == nil {
				return false
			}
		}
		question, answer := 0, n
		if up {
			question, answer = n, 0
		}
		e := a.exchange(ctx, socks.AddrFrom(p.Ends.UDP[0][0]), [2]int{}, question, answer, tries)
		switch {
		case e == nil:
			return false
		case e.whole && (up || len(e.payload) == n):
			return true
		case up:
			cut = e.arrived
		default:
			cut = len(e.payload)
		}
		return false
	}
	header := len(socks.AppendUDPHeader(nil, socks.AddrFrom(p.Ends.UDP[0][0])))
	low, high := 0, maxUDP-header+1 // low arrives, high does not
	if arrives(high - 1) {
		return high - 1, 0
	}
	for _, usual := range []int{512, 1400, 1472} { // start below the usual limits
		if !arrives(usual) {
			high = usual
			break
		}
		low = usual
	}
	for high-low > 1 && ctx.Err() == nil {
		if middle := (low + high) / 2; arrives(middle) {
			low = middle
		} else {
			high = middle
		}
	}
	return low, cut
}

// fates sends datagrams that cannot be sent, each on its own association, and checks what happens to the
// associations.
func (p *prober) fates(ctx context.Context, zero netip.Addr) map[string]Fate {
	bad := map[string]socks.Addr{
		"port 0":       {IP: p.Ends.TCP.Addr()},
		"unknown name": {Name: "no-such-host.invalid", Port: 9},
	}
	if p.Ends.Refused.IsValid() {
		bad["closed port"] = socks.AddrFrom(p.Ends.Refused)
	}
	for why, at := range p.Ends.Unsendable {
		bad[why] = socks.AddrFrom(at)
	}
	after := map[string]Fate{}
	for why, dst := range bad {
		if fate, ok := p.fate(ctx, zero, dst); ok {
			after[why] = fate
		}
	}
	return after
}

func (p *prober) fate(ctx context.Context, zero netip.Addr, dst socks.Addr) (Fate, bool) {
	a, _, _ := p.associate(ctx, zero)
	if a == nil {
		return "", false
	}
	defer a.close()
	before := a.small(ctx)
	if before == nil {
		return "", false
	}
	for range 2 { // the kernel reports some errors only at the next one
		a.u.Write(append(socks.AppendUDPHeader(nil, dst), "not to be sent"...))
		time.Sleep(settle)
	}
	e := a.small(ctx)
	switch {
	case a.ended():
		return Ended, true
	case e == nil:
		return Mute, true
	case e.seen != before.seen:
		return NewPort, true
	}
	return Survives, true
}
