package doctor

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/conform"
	"github.com/viasocks/viasocks/socks"
)

// peer is the far end that the user has named.
type peer struct {
	dst   socks.Addr // as it is named to the proxy
	ends  conform.Ends
	six   netip.AddrPort // its IPv6 address, if it has one
	name  string         // as the user gave it; empty: an address was given
	free  conform.Prober // tests that need no session
	probe conform.Prober // tests with a session
	s     *conform.Session
}

// withPeer runs the tests that need a far end.
func (p *proxy) withPeer(ctx context.Context, free conform.Prober) []Finding {
	x, f := p.openPeer(ctx, free)
	if x == nil {
		return []Finding{f}
	}
	defer x.s.Close()
	all := []Finding{f, x.trip(ctx)} // before the other tests load the line
	all = append(all, together(
		func() []Finding { return x.refused(ctx) },
		func() []Finding { return x.otherAddresses(ctx) },
		func() []Finding { return x.endings(ctx) },
		func() []Finding { return p.udp(ctx, x) },
	)...)
	return append(all, x.speed(ctx))
}

// openPeer opens a session with the peer. If it returns nil, the Finding tells why.
func (p *proxy) openPeer(ctx context.Context, free conform.Prober) (*peer, Finding) {
	named := p.a.h.cfg.Peers
	x := &peer{free: free}
	var addrs [2][]netip.Addr
	for i, n := range named {
		addrs[i] = lookUp(ctx, n)
	}
	main := named[0]
	if _, err := netip.ParseAddr(main.Host); err != nil {
		x.name = main.Host
	}
	four := firstOf(addrs[0], netip.Addr.Is4)
	six := firstOf(append(addrs[0], addrs[1]...), netip.Addr.Is6)
	switch {
	case four.IsValid():
		x.ends.TCP = netip.AddrPortFrom(four, main.Port)
	case len(addrs[0]) > 0:
		x.ends.TCP = netip.AddrPortFrom(addrs[0][0], main.Port)
	}
	if six.IsValid() {
		x.six = netip.AddrPortFrom(six, main.Port)
	}
	x.dst = socks.AddrFrom(x.ends.TCP)
	if !x.ends.TCP.IsValid() {
		x.dst = socks.Addr{Name: main.Host, Port: main.Port} // the proxy may know the name
	}
	bad := Finding{Check: "the far end", Level: Fault, Means: "The tests that need it were left out.",
		Do: fmt.Sprintf(
			"start 'viasocks doctor --serve' on %s, and open TCP and UDP ports %d and %d in its firewall",
			main.Host,
			main.Port,
			main.Port+1,
		)}
	s, a, err := free.Session(ctx, x.dst, answerTime)
	switch {
	case err != nil:
		bad.Found = fmt.Sprintf("The peer %s was reached through the proxy, but %v.", main, err)
		return nil, bad
	case s == nil:
		bad.Found = fmt.Sprintf("The peer %s cannot be reached through the proxy: %s.", main, answerWords(a, answerTime))
		return nil, bad
	}
	x.s = s
	x.udpEnds(main.Port, addrs[1])
	x.probe = p.prober(x.ends, s.Token)
	from := ""
	if s.Seen.IsValid() {
		from = fmt.Sprintf(" It sees %v as the sender.", s.Seen.Addr().Unmap())
	}
	return x, Finding{Check: "the far end", Level: OK,
		Found: fmt.Sprintf("Bytes travel both ways through the proxy to %s (connected after %s).%s", main, millis(a.After), from)}
}

// udpEnds returns the addresses of the peer's UDP sockets: two ports, and possibly a second address.
func (x *peer) udpEnds(port uint16, second []netip.Addr) {
	if !x.ends.TCP.IsValid() {
		return
	}
	first := x.ends.TCP.Addr()
	x.ends.UDP[0][0] = netip.AddrPortFrom(first, port)
	x.ends.UDP[0][1] = netip.AddrPortFrom(first, x.s.Ports[1])
	if other := firstOf(second, func(a netip.Addr) bool { return a.Is4() == first.Is4() && a != first }); other.IsValid() &&
		x.s.Addresses > 1 {
		x.ends.UDP[1][0] = netip.AddrPortFrom(other, port)
		x.ends.UDP[1][1] = netip.AddrPortFrom(other, x.s.Ports[1])
	}
}

func lookUp(ctx context.Context, n config.Peer) []netip.Addr {
	if a, err := netip.ParseAddr(n.Host); err == nil {
		return []netip.Addr{a.Unmap()}
	}
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	all, err := net.DefaultResolver.LookupNetIP(ctx, "ip", n.Host)
	if err != nil {
		return nil
	}
	for i := range all {
		all[i] = all[i].Unmap()
	}
	return all
}

func firstOf(all []netip.Addr, is func(netip.Addr) bool) netip.Addr {
	for _, a := range all {
		if is(a) {
			return a
		}
	}
	return netip.Addr{}
}

func (x *peer) trip(ctx context.Context) Finding {
	d, err := x.probe.Trip(ctx)
	if err != nil {
		return Finding{Check: "latency", Level: NotTested, Found: "The connection ended: " + err.Error() + "."}
	}
	f := Finding{Check: "latency", Level: OK, Found: fmt.Sprintf("A byte takes %s to the peer and back.", span(d))}
	if d > 500*time.Millisecond {
		f.Level, f.Means = Warning, "SSH and games feel slow; downloads with many connections (aria2 -x 8) do not suffer."
	}
	return f
}

// refused requests a port of the peer on which nothing listens.
func (x *peer) refused(ctx context.Context) []Finding {
	if !x.ends.TCP.IsValid() {
		return nil
	}
	a := x.free.Request(ctx, socks.AddrFrom(netip.AddrPortFrom(x.ends.TCP.Addr(), x.s.Closed)), answerTime)
	f := Finding{Check: "closed port", Level: OK}
	switch {
	case a.Kind == conform.Granted:
		f.Level, f.Found, f.Means = Warning, "The proxy says yes to a port of the peer where nobody listens.", early
	case a.Kind == conform.Refused && socks.Reply(a.Code) == socks.ReplyRefused, a.Kind == conform.Closed,
		a.Kind == conform.Reset:
		f.Found = fmt.Sprintf("A closed port is reported as \"connection refused\" after %s.", millis(a.After))
	case a.Kind == conform.Refused:
		f.Found = fmt.Sprintf("A closed port is reported as another error than \"connection refused\" (%s).", replyWords(a.Code))
	case a.Kind == conform.Silence:
		f.Level, f.Found = NotTested, "The proxy is silent about a closed port; "+
			"a firewall before the peer may swallow the attempt."
	default:
		f.Level, f.Found = NotTested, a.Error
	}
	return []Finding{f}
}

// otherAddresses connects to the peer by its name and by IPv6.
func (x *peer) otherAddresses(ctx context.Context) []Finding {
	return together(
		func() []Finding {
			if x.name == "" {
				return nil
			}
			return []Finding{x.byName(ctx)}
		},
		func() []Finding {
			if !x.six.IsValid() || x.six == x.ends.TCP {
				return nil
			}
			return []Finding{x.byIPv6(ctx)}
		},
	)
}

func (x *peer) byName(ctx context.Context) Finding {
	a := x.free.Reach(ctx, socks.Addr{Name: x.name, Port: x.dst.Port}, answerTime)
	if a.Works {
		return Finding{Check: "names", Level: OK, Found: "The proxy reaches the peer by its name."}
	}
	return Finding{
		Check: "names",
		Level: Fault,
		Found: "The proxy does not reach the peer by its name: " + answerWords(a, answerTime) + ".",
		Means: "With --dns fake, the default, names travel to the proxy.",
		Do:    "mend the proxy's resolver; or --dns tcp://1.1.1.1",
	}
}

func (x *peer) byIPv6(ctx context.Context) Finding {
	a := x.free.Reach(ctx, socks.AddrFrom(x.six), answerTime)
	if a.Works {
		return Finding{Check: "IPv6", Level: OK, Found: "The proxy reaches the peer by IPv6."}
	}
	return Finding{
		Check: "IPv6",
		Level: Warning,
		Found: "The proxy does not reach the peer by IPv6: " + answerWords(a, answerTime) + ".",
		Means: noIPv6Means,
		Do:    noIPv6Do,
	}
}

// endings tests whether FIN and RST pass through the proxy.
func (x *peer) endings(ctx context.Context) []Finding {
	var up, down, rup, rdown conform.Passage
	together(
		func() []Finding { up, down = x.probe.HalfClose(ctx); return nil },
		func() []Finding { rup, rdown = x.probe.Resets(ctx); return nil },
	)
	half := Finding{Check: "half-close", Level: OK, Found: "When one side has said all, the other side can still answer."}
	switch {
	case up == conform.Unknown || down == conform.Unknown:
		half.Level, half.Found = NotTested, "The connections for it failed."
	case up != conform.Passed || down != conform.Passed:
		half.Level, half.Found = Warning, "When one side has said all, the proxy ends the other direction too, and what is "+
			"still to come is lost."
		half.Means = "rsync, git over SSH, netcat and printers may lose the end of what they get. " +
			"HTTP and BitTorrent do not mind."
		half.Do = "use another proxy for these programs, or --rule 'port 22 direct' where they may go past it"
	}
	reset := Finding{Check: "reset", Level: OK, Found: "A connection that is broken off is seen as broken off."}
	switch {
	case rup == conform.Unknown || rdown == conform.Unknown:
		reset.Level, reset.Found = NotTested, "The connections for it failed."
	case rup == conform.Lost || rdown == conform.Lost:
		reset.Level, reset.Found = Warning, "A connection that is broken off stays open on the other side."
		reset.Means = "Servers keep dead connections, and programs wait until their own timeout."
	case rup != conform.Passed || rdown != conform.Passed:
		reset.Found = "A connection that is broken off is seen as one that ended in order; most proxies do that."
		reset.Means = "A download without a length, or one by FTP, that broke off may look complete."
		reset.Do = "with dante: add 'log: error' to the 'socks pass' rule of its configuration, for dante then passes resets on"
	}
	return []Finding{half, reset}
}

// least is the speed, in bytes per second, below which a proxy is called slow.
const least = 64 << 10

func (x *peer) speed(ctx context.Context) Finding {
	down, up := x.probe.Speed(ctx)
	f := Finding{Check: "speed", Level: OK, Found: fmt.Sprintf("One connection carries %s down and %s up.", rate(down), rate(up))}
	switch {
	case down == 0:
		f.Level = Fault
		f.Found = "Small answers arrive, but of a download from the peer nothing does: large packets may be lost on the way " +
			"(an MTU black hole)."
		f.Means = "Web pages and downloads hang in the beginning."
		f.Do = "ip link set dev DEVICE mtu 1280 on the proxy's host or here; " +
			"sysctl -w net.ipv4.tcp_mtu_probing=1 on the proxy's host"
	case up == 0:
		f.Level, f.Found = Warning, fmt.Sprintf("One connection carries %s down; of what it sent up, "+
			"too little arrived to be measured.", rate(down))
	case down < least || up < least:
		f.Level, f.Means = Warning, "One connection is slow; programs that use several (aria2 -x 8 -s 8) may get more."
	}
	return f
}

func rate(bytes float64) string {
	switch {
	case bytes >= 10<<20:
		return fmt.Sprintf("%.0f MiB/s", bytes/(1<<20))
	case bytes >= 1<<20:
		return fmt.Sprintf("%.1f MiB/s", bytes/(1<<20))
	}
	return fmt.Sprintf("%.0f KiB/s", bytes/(1<<10))
}
