package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/conform"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
	"github.com/viasocks/viasocks/socks"
)

// The requests that a proxy is expected to refuse. Nobody has the name (RFC 6761, section 6.4) or the addresses (RFC
// 5737, RFC 3849).
var (
	noName = socks.Addr{Name: "no-such-host.invalid", Port: 9}
	noHost = socks.AddrFrom(netip.MustParseAddrPort("192.0.2.1:9"))
	noIPv6 = socks.AddrFrom(netip.MustParseAddrPort("[2001:db8::1]:9"))
)

// proxyChecks returns the checks of the proxies. end frees what they use.
func (h *host) proxyChecks() (list []check, end func()) {
	one := func(f Finding) ([]check, func()) {
		return []check{
			{part: "proxy", name: "proxy", limit: quick, run: func(context.Context) []Finding { return []Finding{f} }},
		}, func() {}
	}
	if len(h.cfg.Upstreams) == 0 {
		return one(Finding{Level: NotTested, Found: "No proxy was given.",
			Do: "--proxy socks5://HOST:PORT, or set VIASOCKS_PROXY"})
	}
	a, err := h.newAccess()
	if err != nil {
		return one(Finding{Level: Fault, Found: sentence(err)})
	}
	proxies, more, err := a.proxies()
	if err != nil {
		a.close()
		return one(Finding{Level: Fault, Found: sentence(err)})
	}
	for i, p := range proxies {
		main := i == 0
		list = append(list, check{part: p.label, name: "proxy", limit: Limit - 3*late, run: func(ctx context.Context) []Finding {
			return p.examine(ctx, main)
		}})
	}
	if more > 0 {
		list = append(list, check{part: "more proxies", name: "proxy", limit: quick, run: func(context.Context) []Finding {
			return []Finding{
				{Level: NotTested, Found: fmt.Sprintf("%d more servers were left out.", more),
					Do: "name them alone: --proxy URL"},
			}
		}})
	}
	return list, a.close
}

// examine tests one proxy. main: it is the first one, through which resolvers are asked.
func (p *proxy) examine(ctx context.Context, main bool) []Finding {
	all := p.local()
	begun := time.Now()
	reach, cancel := context.WithTimeout(ctx, answerTime)
	err := p.check(reach)
	cancel()
	if err != nil {
		return append(all, p.faults(err)...)
	}
	all = append(all, p.reached(ctx, time.Since(begun))...)
	free := p.prober(conform.Ends{}, "")
	var parts []func() []Finding
	if p.direct() {
		parts = append(parts, func() []Finding { return p.mtu(ctx) })
	}
	parts = append(parts, func() []Finding { return p.refusals(ctx, free) })
	if main {
		parts = append(parts, func() []Finding { return p.resolvers(ctx, free) })
	}
	if len(p.a.h.cfg.Peers) == 0 {
		parts = append(parts, func() []Finding { return p.udpAlone(ctx, free) }, noPeer)
		return append(all, together(parts...)...)
	}
	parts = append(parts, func() []Finding { return p.withPeer(ctx, free) })
	return append(all, lastOfEach(together(parts...), "names", "IPv6")...)
}

// lastOfEach keeps only the last of several findings with the same name out of checks, because a test with a peer is
// more certain than a guess without one.
func lastOfEach(all []Finding, checks ...string) []Finding {
	last := map[string]int{}
	for i, f := range all {
		last[f.Check] = i
	}
	var out []Finding
	for i, f := range all {
		if last[f.Check] == i || !slices.Contains(checks, f.Check) {
			out = append(out, f)
		}
	}
	return out
}

// noPeer tells which tests need a far end.
func noPeer() []Finding {
	return []Finding{{Check: "the far end", Level: NotTested,
		Found: "Bytes both ways, latency, speed, the kind of NAT and the size of datagrams, and how connections end.",
		Do:    "'viasocks doctor --serve' on a host of yours behind the proxy, and here --peer HOST"}}
}

// local tells whether the proxy runs on this host.
func (p *proxy) local() []Finding {
	if !p.direct() {
		return nil
	}
	cfg := *p.a.h.cfg
	found, err := daemon.LocalProxies(&cfg, func(s socks.Server) []netip.Addr {
		if s.String() != p.server.String() {
			return nil
		}
		return localAddrs(s)
	})
	if err != nil || len(found) == 0 {
		return nil
	}
	l := found[0]
	f := Finding{Check: "on this host", Level: OK, Found: fmt.Sprintf("The proxy runs on this host (%s).", l.Program)}
	if l.Excluded != "" {
		f.Means = fmt.Sprintf("'viasocks up' lets the proxy's own connections pass: %s.", l.Excluded)
		return []Finding{f}
	}
	f.Level = Warning
	f.Means = "'viasocks run' works. 'viasocks up' would lead the proxy's own connections back to the proxy, and refuses " +
		"them: nothing would be reached."
	f.Do = l.Hint
	return []Finding{f}
}

// localAddrs returns the addresses of a server that is given by address or by the name of this host.
func localAddrs(s socks.Server) []netip.Addr {
	host := strings.TrimSuffix(s.Host(), ".")
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap()}
	}
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	return nil
}

// faults tells why the proxy cannot be used.
func (p *proxy) faults(err error) []Finding {
	told := daemon.Explain(p.server, err).Error()
	for _, question := range []string{": is ", ": does "} { // Do tells what to do
		told, _, _ = strings.Cut(told, question)
	}
	f := Finding{
		Check: "reached",
		Level: Fault,
		Found: sentence(errors.New(told)),
		Means: "Nothing can be carried through this proxy.",
	}
	where := p.server.Where()
	var fault *socks.ServerError
	op := ""
	if errors.As(err, &fault) {
		op = fault.Op
	}
	reached := Finding{Check: "reached", Level: OK, Found: "Something answers at " + where + "."}
	switch {
	case errors.Is(err, socks.ErrCredentials), errors.Is(err, socks.ErrMethod), errors.Is(err, socks.ErrNoPassword):
		f.Check = "login"
		f.Do = fmt.Sprintf("--proxy %s --password-file FILE, with the password as the first line of FILE", withUser(p.server))
		return []Finding{reached, f}
	case op == socks.OpResolve:
		f.Do = "correct the name in --proxy, or give the proxy's address"
	case op == socks.OpConnect && p.a.h.up != nil && !p.a.h.root:
		f.Do = "'viasocks up' is running, and its filter stops other programs' connections to the proxy: sudo viasocks doctor"
	case op == socks.OpConnect && strings.Contains(told, "refused"):
		f.Do = "start the proxy, or correct the port in --proxy; 'ss -ltn' on the proxy's host lists the ports that are open"
	case op == socks.OpConnect:
		f.Do = "check the address in --proxy, that the proxy's host is up, and the firewalls on the way"
	case op == socks.OpSecure:
		f.Check = "TLS"
		return []Finding{reached, f}
	default:
		f.Check = p.server.Protocol()
		f.Do = "check the scheme and the port in --proxy (socks5, socks4, http, +tls), and whether the proxy allows this host"
		return []Finding{reached, f}
	}
	return []Finding{f}
}

// withUser returns an example of a URL with a user.
func withUser(s socks.Server) string {
	user := s.User()
	if user == "" {
		user = "USER"
	}
	scheme, _, _ := strings.Cut(s.String(), "://")
	return fmt.Sprintf("%s://%s@%s", scheme, user, s.Where())
}

// reached tells how long a connection to the proxy takes, and that the login succeeds.
func (p *proxy) reached(ctx context.Context, took time.Duration) []Finding {
	begun := time.Now()
	if c, err := p.carrier(ctx, nil); err == nil {
		took = time.Since(begun)
		c.Close()
	}
	all := []Finding{{Check: "reached", Level: OK, Found: fmt.Sprintf("It answers; a connection to it takes %s.", span(took))}}
	if took > time.Second {
		all[0].Level, all[0].Means = Warning, "Each new connection of a program waits for at least so long."
		all[0].Do = "--pool 8 keeps connections to the proxy ready"
	}
	if p.server.HasCredentials() && p.server.Protocol() == "SOCKS5" {
		all = append(all, Finding{Check: "login", Level: OK, Found: "The proxy accepts the user and password, or asks for none."})
	}
	return all
}

// refusals requests destinations that do not exist. A truthful proxy refuses each kind of address in time.
func (p *proxy) refusals(ctx context.Context, free conform.Prober) []Finding {
	limit := answerTime
	if p.server.Tor() {
		limit = 2 * answerTime
	}
	target := noName
	if !p.server.TakesNames() {
		target = noHost
	}
	var named, six conform.Answer
	together(
		func() []Finding { named = free.Request(ctx, target, limit); return nil },
		func() []Finding { six = free.Request(ctx, noIPv6, answerTime); return nil },
	)
	all := []Finding{errorsFinding(named, limit)}
	if p.server.TakesNames() {
		all = append(all, namesFinding(named, limit))
	}
	return append(all, ipv6Finding(six, named.Kind != conform.Granted))
}

const early = "Programs see every connection succeed at first, and then end or hang: aria2 and BitTorrent clients " +
	"keep dead peers and mirrors for a long time, browsers show an empty answer in place of an error."

func errorsFinding(a conform.Answer, limit time.Duration) Finding {
	f := Finding{Check: "errors", Level: OK}
	switch a.Kind {
	case conform.Granted:
		f.Level = Warning
		f.Found = "The proxy grants a connection before it dials: it said yes to a host that does not exist."
		f.Means = early
		f.Do = "use a proxy that dials first (dante, microsocks, Tor), if you can; " +
			"no option of viasocks can tell what the proxy does not"
	case conform.Refused:
		f.Found = fmt.Sprintf("The proxy says so when a host cannot be reached (%s, after %s).", replyWords(a.Code),
			millis(a.After))
	case conform.Closed, conform.Reset:
		f.Found = "The proxy closes the connection when a host cannot be reached (as OpenSSH does): " +
			"programs see \"connection refused\"."
	case conform.Silence:
		f.Level, f.Found = NotTested, fmt.Sprintf("The proxy gave no answer about a host that does not exist within %v.", limit)
	default:
		f.Level, f.Found = Fault, "A request for a connection failed: "+a.Error+"."
		f.Do = "try 'curl --proxy' with the same URL; look at the proxy's log"
	}
	return f
}

func namesFinding(a conform.Answer, limit time.Duration) Finding {
	f := Finding{Check: "names", Level: OK, Found: "The proxy looks names up itself."}
	switch {
	case a.Kind == conform.Granted:
		f.Level, f.Found = NotTested, "It cannot be told whether the proxy looks up names, since it says yes to every name."
		f.Do = "--peer NAME tests it"
	case a.Kind == conform.Refused && socks.Reply(a.Code) == socks.ReplyAddrTypeNotSupported:
		f.Level, f.Found = Warning, "The proxy takes no names, only addresses."
		f.Means = "With --dns fake, the default, viasocks looks a name up again by its resolvers each time: slow, " +
			"and not with local names."
		f.Do = "--dns tcp://1.1.1.1, or another resolver that the proxy can reach"
	case a.Kind == conform.Silence:
		f.Level, f.Found = Fault, fmt.Sprintf(
			"The proxy does not finish looking up a name: no answer within %v. Its resolver seems to be dead.",
			limit,
		)
		f.Means = "Every name that is not in the proxy's cache hangs: downloads do not start, browsers wait."
		f.Do = "mend the resolver on the proxy's host (its /etc/resolv.conf); " +
			"until then --dns tcp://1.1.1.1 sends addresses to the proxy"
	case a.Kind == conform.Refused && socks.Reply(a.Code) == socks.ReplyNotAllowed:
		f.Level, f.Found = NotTested, "The proxy's rules refuse the name that was tried."
		f.Do = "--peer NAME tests it"
	case a.Kind == conform.Failed, a.Kind == conform.Malformed, a.Kind == conform.NoLogin:
		f.Level, f.Found = NotTested, "The request failed."
	}
	return f
}

const (
	noIPv6Means = "Sites and BitTorrent peers that have only IPv6 cannot be reached; programs that try IPv6 first lose a moment."
	noIPv6Do    = "--ipv6 off, so that programs use IPv4 at once"
)

// soon is the time within which a proxy answers if it does not have to wait for others.
const soon = 1500 // ms

func ipv6Finding(a conform.Answer, truthful bool) Finding {
	f := Finding{Check: "IPv6", Level: Warning,
		Means: noIPv6Means, Do: noIPv6Do}
	reply := socks.Reply(a.Code)
	switch {
	case a.Kind == conform.Failed && strings.Contains(a.Error, socks.ErrCannotExpress.Error()):
		f.Found = "The protocol of this proxy (SOCKS4) has no IPv6 addresses."
	case a.Kind == conform.Refused && reply == socks.ReplyAddrTypeNotSupported:
		f.Found = "The proxy takes no IPv6 addresses."
	case !truthful:
		return Finding{Check: "IPv6", Level: NotTested, Found: "It cannot be told, since the proxy says yes to every address.",
			Do: "--peer with an IPv6 address tests it"}
	case a.Kind == conform.Refused && a.After < soon &&
		(reply == socks.ReplyNetUnreachable || reply == socks.ReplyGeneralFailure):
		f.Found = fmt.Sprintf("The proxy's host seems to have no IPv6: it has no way to an IPv6 address (%s).",
			replyWords(a.Code))
	default:
		return Finding{
			Check: "IPv6",
			Level: NotTested,
			Found: "The proxy takes IPv6 addresses; whether it reaches any cannot be told without a peer.",
			Do:    "--peer with an IPv6 address tests it",
		}
	}
	return f
}

// udpAlone opens an association. Without a peer, it has nobody to send datagrams to.
func (p *proxy) udpAlone(ctx context.Context, free conform.Prober) []Finding {
	a := free.Association(ctx)
	if f, ok := p.noUDP(a); !ok {
		return []Finding{f}
	}
	f := Finding{
		Check: "UDP",
		Level: OK,
		Found: "The proxy offers UDP; whether datagrams come back cannot be told without a peer.",
	}
	if p.server.UDPOverTCP() {
		f.Found = "The proxy takes UDP over TCP; whether datagrams come back was not tested."
	}
	return []Finding{f}
}

const withoutUDP = "aria2's DHT and UDP trackers, QUIC (HTTP/3), WebRTC and games do not work through it; names, " +
	"HTTP, SSH and BitTorrent over TCP do."

// noUDP returns the finding about a proxy without UDP. ok means that the proxy has UDP.
func (p *proxy) noUDP(a conform.Answer) (f Finding, ok bool) {
	f = Finding{Check: "UDP", Level: Warning, Means: withoutUDP,
		Do: "use a proxy with UDP (dante, sing-box, gost); with this one: aria2c --enable-dht=false, " +
			"and trackers with http:// or https://"}
	switch {
	case a.Kind == conform.Granted:
		return Finding{}, true
	case strings.HasPrefix(p.server.Protocol(), "SOCKS4"), p.server.Protocol() == "HTTP":
		f.Found = fmt.Sprintf("The protocol of this proxy (%s) has no UDP.", p.server.Protocol())
	case p.via != nil:
		f.Found = "A proxy that is reached through another one carries no UDP."
	case a.Kind == conform.Refused:
		f.Found = fmt.Sprintf("The proxy has no UDP: it refuses UDP ASSOCIATE (%s).", replyWords(a.Code))
	case a.Kind == conform.Closed, a.Kind == conform.Reset:
		f.Found = "The proxy has no UDP: it closes the connection that asks for it."
	case a.Kind == conform.Silence:
		f.Found = "The proxy does not answer a request for UDP."
	default:
		f.Found = "The proxy gives no UDP: " + a.Error + "."
	}
	return f, false
}

// replyWords returns a reply code as text for people.
func replyWords(code int) string {
	_, words, ok := strings.Cut(strings.TrimSuffix(socks.Reply(code).Error(), ")"), "(")
	if !ok {
		return fmt.Sprintf("reply %d", code)
	}
	return fmt.Sprintf("reply %d, %s", code, words)
}

// span returns a duration as text for people.
func span(d time.Duration) string {
	if d < time.Millisecond {
		return "less than 1 ms"
	}
	if d < 10*time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}

func millis(ms int64) string { return span(time.Duration(ms) * time.Millisecond) }
