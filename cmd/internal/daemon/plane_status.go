package daemon

import (
	"fmt"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route"
)

// resolverWords returns the mode of names and the resolvers, in the words of --dns.
func resolverWords(cfg *config.Config) (words []string) {
	if cfg.Fake.On {
		words = append(words, "fake")
	}
	if cfg.Relay {
		words = append(words, "relay")
	}
	if cfg.DNSOff {
		words = append(words, "off")
	}
	for _, r := range cfg.DNS {
		words = append(words, r.String())
	}
	return words
}

// fill adds what the data plane knows, for `up` and `run`.
func (p *plane) fill(s *control.Status, cfg *config.Config, allowed *endpoints) {
	fillUpstreams(s, cfg, p, allowed)
	p.dial.absent.fill(s, cfg)
	for _, r := range p.router.Rules() {
		s.Rules = append(s.Rules, control.Rule{Rule: r.Rule, Hits: r.Hits})
	}
	c := p.counters()
	fillTraffic(s, p.router, &c)
	s.Shards = control.Shards{Now: p.stack.Shards(), HandedOver: c.Stack.HandedOver}
	if n := c.Pool; cfg.Fake.On && p.dial.pool != nil {
		s.Names.Pool = &control.Pool{
			Names: uint64(n.Names), Size: uint64(n.Size), Held: uint64(n.Held), Evicted: n.Evicted, Refused: n.Refused,
		}
	}
	if g := p.gso.Load(); g != nil {
		s.UDP.GSO, s.UDP.GSOReason = g.String(), g.why
	}
	if w := shortageWarning(p.router.Shortage(), time.Now()); w != "" {
		s.Warnings = append(s.Warnings, w)
	}
	if n := c.Route.DecisionsLost; n > 0 {
		s.Warnings = append(
			s.Warnings,
			fmt.Sprintf("%d lines of --decisions were lost: the file is written too slowly, or cannot be written", n),
		)
	}
}

// shortageShown is how long status warns of a shortage after it last occurred.
const shortageShown = 5 * time.Minute

// shortageWarning returns the line of status about a resource of this host that has run out; "": none has.
func shortageWarning(s route.Shortage, now time.Time) string {
	if s.Times == 0 || now.Sub(s.Last) >= shortageShown {
		return ""
	}
	return fmt.Sprintf("this host ran out of what new flows need, %d times since the start, %v ago the last time: %s",
		s.Times, now.Sub(s.Last).Round(time.Second), s.Why)
}

func fillUpstreams(s *control.Status, cfg *config.Config, p *plane, allowed *endpoints) {
	words := map[bool]string{false: control.UpstreamOK, true: control.UpstreamDown}
	for _, u := range p.router.Upstreams() {
		up := control.Upstream{Name: u.Name, TCP: words[u.TCPDown], UDP: words[u.UDPDown], IPv6: u.IPv6, NamesUDP: u.NamesUDP,
			Granted: u.Granted, Failed: u.Failed, LatencyMS: float64(u.Latency.Microseconds()) / 1000}
		if !u.UDPTried && !u.UDPDown {
			up.UDP = control.UpstreamNotTried
		}
		if cfg.ReachHost.On() && u.Name == route.HostUpstream {
			up.URL = "loopback of this host, port " + cfg.ReachHost.String()
		}
		for _, c := range cfg.Upstreams {
			if c.Name != u.Name {
				continue
			}
			up.URL, up.Via = c.Server.String(), c.Via
			if allowed == nil {
				continue
			}
			for _, server := range c.Reached() {
				for _, at := range allowed.of(server.String()) {
					up.Addresses = append(up.Addresses, fmt.Sprintf("%s/%s", at.Addr, at.Proto))
				}
			}
		}
		if all := p.servers(u.Name); len(all) > 1 {
			for _, server := range all {
				x := control.UpstreamServer{URL: server.Server, State: words[server.Down], Associations: server.Associations}
				if server.Why != nil {
					x.Why = server.Why.Error()
				}
				up.Servers = append(up.Servers, x)
			}
			up.URL = fmt.Sprintf("%d servers", len(all))
		}
		s.Upstreams = append(s.Upstreams, up)
	}
}

func fillTraffic(s *control.Status, router *route.Router, c *counters) {
	r := &c.Route
	s.TCP = control.TCP{Now: r.StreamsNow, Pending: int(c.Stack.Pending), Total: r.Streams, Refused: r.StreamsRefused,
		SecondTries: r.SecondTries, SecondOpened: r.SecondOpened}
	s.UDP = control.UDP{Now: r.MappingsNow, Total: r.Mappings, Reassociated: r.Reassociations, Refused: r.Refused}
	s.Names = control.Names{
		Asked: r.DNS.Questions, Answered: r.DNS.Answered + r.DNS.Relayed + r.DNS.Own + r.DNS.Cached, Failed: r.DNS.Failed,
		Own:    r.DNS.Own,
		Cached: r.DNS.Cached, Shared: r.DNS.Shared, Cache: control.Cache{Entries: r.DNS.CacheEntries, Bytes: r.DNS.CacheBytes},
	}
	if r.Sniffs > 0 || r.SniffsFull > 0 {
		s.Sniff = &control.Sniff{Asked: r.Sniffs, Named: r.Sniffed, Full: r.SniffsFull}
	}
	s.Up, s.Down = r.Up, r.Down
	for _, f := range router.Flows() {
		s.Up += f.Up
		s.Down += f.Down
	}
	s.Counters, s.Dropped = c.all(), c.lost()
}

// flows lists what the data plane carries.
func (p *plane) flows() (all []control.Flow) {
	for _, f := range p.router.Flows() {
		all = append(all, flowOf(f))
	}
	return all
}

func flowOf(f route.FlowInfo) control.Flow {
	return control.Flow{
		ID: f.ID, Proto: f.Proto.String(), Src: f.Src.String(), Dst: f.Dst.String(), Host: f.Host, Rule: f.Rule,
		Upstream: f.Upstream, State: f.State, Start: f.Start, Up: f.Up, Down: f.Down, PID: f.PID, Exe: f.Exe,
	}
}
