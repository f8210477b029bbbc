package route

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/count"
)

// Counters is the table of a Router's counters; see package count.
type Counters[T any] struct {
	Streams T `metric:"flows_total" label:"proto=tcp" help:"Flows: TCP connections that were asked for, and UDP mappings."`
	// Mappings that were made.
	Mappings T `metric:"flows_total" label:"proto=udp"`
	// Connections that peers made to programs by way of an upstream (BIND).
	Incoming T `metric:"flows_total" label:"proto=tcp_incoming"`
	Ended    T `metric:"flows_ended_total" help:"Flows that have ended."`
	// Refused by a rule, by a limit, or by the upstream.
	StreamsRefused T `metric:"tcp_flows_refused_total" help:"TCP flows that were refused, for whatever reason."`
	// Those of StreamsRefused that exceeded Limits.Flows.
	StreamsFull T `metric:"tcp_flows_over_limit_total" label:"limit=flows" help:"TCP flows put off because of a limit."`
	// Those of StreamsRefused for which too many flows waited for their owner; they are retransmitted.
	AsksFull T `metric:"tcp_flows_over_limit_total" label:"limit=owners"`
	// Those of StreamsRefused for which too many flows were held; they are retransmitted.
	SniffsFull T `metric:"tcp_flows_over_limit_total" label:"limit=sniffs"`
	// TCP flows that were held for their name before they were dialled.
	Sniffs  T `metric:"sniffs_total" help:"TCP flows that were held for their name."`
	Sniffed T `metric:"sniffs_named_total" help:"TCP flows that were held and had a name."`
	// TCP flows that were dialled again by an address, because the server could not reach their name.
	SecondTries  T `metric:"second_tries_total" help:"TCP flows to a name that were dialled again by an address."`
	SecondOpened T `metric:"second_tries_granted_total" help:"TCP flows that were granted when they were dialled again by an address."`
	// PORT and EPRT commands of FTP for which a server listens, and the connections that came to them.
	FTPBound     T `metric:"ftp_active_total" label:"result=bound" help:"PORT and EPRT commands of FTP, and the connections for them."`
	FTPConnected T `metric:"ftp_active_total" label:"result=connected"`
	// Commands for which no server listens, so that they were refused.
	FTPRefused T `metric:"ftp_active_total" label:"result=refused"`
	// Connections that were not the FTP server's.
	FTPBogus T `metric:"ftp_active_total" label:"result=impossible_peer" lost:"FTP data connections from another address than the server's"`
	// TCP flows whose app had closed its socket while the far end went on.
	Orphans T `metric:"tcp_orphans_total" help:"TCP flows that were ended because their program had closed its socket."`

	// Ended after a silence of their lifetime, with the socket gone.
	MappingsExpired T `metric:"mappings_ended_total" label:"reason=silent" help:"UDP mappings that were ended, by reason."`
	// Ended because the socket was gone.
	MappingsGone T `metric:"mappings_ended_total" label:"reason=socket_gone"`
	// Ended to make room for a new one, the longest idle first.
	MappingsEvicted T `metric:"mappings_ended_total" label:"reason=evicted"`
	// Not made, because all mappings were in use.
	MappingsFull T `metric:"mappings_refused_total" help:"UDP mappings that were not made because all were at work."`
	// Links that failed and were made again: by upstream in UpstreamStats.
	Reassociations T

	// Datagrams lost while their association was being made.
	QueueFull T `metric:"datagrams_dropped_total" label:"reason=associating" lost:"datagrams lost while their association was made"`
	// Dropped because of the verdict drop, no room, no mapping, or an address that cannot be carried to.
	Dropped T `metric:"datagrams_dropped_total" label:"reason=rule_or_limit" lost:"datagrams dropped by a rule or for want of room"`
	// Answered with an ICMP error.
	Refused T `metric:"datagrams_refused_total" help:"Datagrams that were answered with an ICMP error."`

	// ICMP echo requests, and the TCP dials by which they are answered (SetPing).
	Echoes    T `metric:"echo_requests_total" help:"ICMP echo requests that --ping takes."`
	EchoDials T `metric:"echo_dials_total" help:"TCP connections that were asked for to answer echo requests."`
	// The destination granted or refused the connection.
	EchoReplies   T `metric:"echo_answers_total" label:"answer=reply" help:"Echo requests by the answer that they got."`
	EchoesRefused T `metric:"echo_answers_total" label:"answer=unreachable"`
	EchoesSilent  T `metric:"echo_answers_total" label:"answer=none"`
	// Over a limit.
	EchoesLimited T `metric:"echo_answers_total" label:"answer=over_limit" lost:"echo requests over a limit of --ping"`

	// Payload bytes of flows that ended.
	Up, Down T
}

// Stats is a snapshot of the counters. Unless it says otherwise, a number counts since the start.
type Stats struct {
	Counters[uint64]

	StreamsNow    int    `metric:"flows" label:"proto=tcp" help:"Flows that there are, pending ones too."`
	MappingsNow   int    `metric:"flows" label:"proto=udp"`
	Pending       int    `metric:"associations_pending" help:"Associations that are being opened."`
	DecisionsLost uint64 `metric:"decisions_lost_total" help:"Lines of --decisions that could not be written."`

	DNS dns.Stats
}

// counters are the source of Stats, for one shard.
type counters struct{ Counters[atomic.Uint64] }

// Stats returns the counters.
func (r *Router) Stats() Stats {
	var s Stats
	if r.decisions != nil {
		s.DecisionsLost = r.decisions.lost.Load()
	}
	s.DNS = r.port53.stats()
	for _, shard := range r.shards {
		shard.addTo(&s)
	}
	return s
}

// addTo adds the counters of one shard to s.
func (r *shard) addTo(s *Stats) {
	count.Add(&s.Counters, &r.count.Counters)
	r.streams.mu.Lock()
	s.StreamsNow += len(r.streams.all)
	r.streams.mu.Unlock()
	r.udp.mu.Lock()
	s.MappingsNow += len(r.udp.all)
	s.Pending += r.udp.dialing
	r.udp.mu.Unlock()
}

// Ended returns how many flows have ended, TCP and UDP; each leaves garbage behind. It may be called from any
// goroutine and takes no lock.
func (r *Router) Ended() (n uint64) {
	for _, s := range r.shards {
		n += s.count.Ended.Load()
	}
	return n
}

// Flows returns the existing flows by ID, for status.
func (r *Router) Flows() []FlowInfo {
	var all []FlowInfo
	for _, s := range r.snapshot() {
		all = append(all, s.info())
	}
	for _, s := range r.shards {
		s.udp.mu.Lock()
		for _, m := range s.udp.all {
			all = append(all, m.info())
		}
		s.udp.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b FlowInfo) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return all
}

// UpstreamInfo is an upstream as status shows it. Down means that the last flow met a fault of the server.
type UpstreamInfo struct {
	Name             string
	TCPDown, UDPDown bool
	UDPTried         bool          // an association was wanted, and the server granted or refused it
	Granted, Failed  uint64        // TCP flows that it granted, and that failed through its own fault
	Latency          time.Duration // from the first packet of a TCP flow to the grant, on average of the last ones; 0: not known
	// NamesUDP says whether its servers take names in the headers of datagrams: "yes", "no", or empty as long as nothing is
	// known or it is not the same for all of them.
	NamesUDP string
	// IPv6 says whether flows have shown that it reaches IPv6: "yes", "no", or empty if nothing is known.
	IPv6 string
}

// Upstreams returns the upstreams in the order of the configuration.
func (r *Router) Upstreams() []UpstreamInfo {
	var all []UpstreamInfo
	now := r.now()
	for _, up := range slices.Concat(r.policy.Load().order, r.host.own()) {
		all = append(all, UpstreamInfo{
			Name: up.name, NamesUDP: up.names.word(now), IPv6: up.ipv6.word(now), TCPDown: up.tcp.isDown(),
			UDPDown: up.udp.isDown(), UDPTried: up.count.triedUDP(),
			Granted: up.dials.granted.Load(), Failed: up.dials.failed.Load(), Latency: time.Duration(up.dials.latency.Load()),
		})
	}
	return all
}

// RuleInfo is a rule and how often it decided, in TCP flows and datagrams.
type RuleInfo struct {
	Rule string
	Hits uint64
}

// Rules returns the rules in their order, and finally what happens to the rest: "default" or "none".
func (r *Router) Rules() []RuleInfo {
	var all []RuleInfo
	p := r.policy.Load()
	for _, v := range append(p.verdicts[:len(p.verdicts):len(p.verdicts)], p.otherwise) {
		all = append(all, RuleInfo{v.rule, v.hits.sum()})
	}
	return all
}
