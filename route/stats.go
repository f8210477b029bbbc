package route

import (
	"slices"
	"sync/atomic"

	"github.com/viasocks/viasocks/route/dns"
)

type counters struct {
	streams, streamsRefused, flowsFull                      atomic.Uint64
	mappings, mappingsExpired, mappingsEvicted              atomic.Uint64
	mappingsFull, mappingsGone, orphans, asksFull           atomic.Uint64
	reassociations, ended                                   atomic.Uint64
	sniffs, sniffed, sniffsFull                             atomic.Uint64
	secondTries, secondOpened                               atomic.Uint64
	dgramsDropped, dgramsRefused, dgramsQueueFull, up, down atomic.Uint64
}

// linkCounters are those of links that were closed.
type linkCounters struct {
	sent, received, full, tooLarge, unsendable, malformed atomic.Uint64
}

// Stats is a snapshot. What is not said to be a number of now counts since the start.
type Stats struct {
	Streams         uint64 // TCP flows that the app asked for
	StreamsRefused  uint64 // by a rule, by a limit, or by the upstream
	StreamsFull     uint64 // of those: because of Limits.Flows
	AsksFull        uint64 // of those: too many waited for their owner to be found; they come again
	Sniffs          uint64 // TCP flows that were asked for their name before they were dialled
	Sniffed         uint64 // of those: had one
	SniffsFull      uint64 // of StreamsRefused: too many were asked at a time; they come again
	SecondTries     uint64 // TCP flows that were dialled again by IPv4, because the server could not reach their name
	SecondOpened    uint64 // of those: were granted
	StreamsNow      int    // pending and open
	Mappings        uint64 // made
	MappingsNow     int
	MappingsExpired uint64 // silent for their life time, and the socket gone
	MappingsGone    uint64 // ended because the socket was gone
	Orphans         uint64 // TCP flows whose app had closed its socket while the far end went on
	MappingsEvicted uint64 // for a new one, the longest idle first
	MappingsFull    uint64 // not made: all were at work
	Reassociations  uint64 // links that failed and were made again
	Pending         int    // associations being opened, now

	Dropped   uint64 // datagrams: verdict drop, no room, no mapping, an address that can't be carried to
	Refused   uint64 // datagrams answered with an ICMP error
	QueueFull uint64 // datagrams lost while their association was made
	Up, Down  uint64 // payload bytes of flows that ended

	// Datagrams of links that were closed.
	Sent, Received, SocketFull, TooLarge, Unsendable, Malformed uint64

	DecisionsLost uint64 // lines that could not be written

	DNS dns.Stats
}

// Stats gives the counters.
func (r *Router) Stats() Stats {
	l := &r.links
	s := Stats{
		Sent: l.sent.Load(), Received: l.received.Load(), SocketFull: l.full.Load(), TooLarge: l.tooLarge.Load(),
		Unsendable: l.unsendable.Load(), Malformed: l.malformed.Load(),
	}
	if r.decisions != nil {
		s.DecisionsLost = r.decisions.lost.Load()
	}
	s.DNS = r.dnsStats()
	for _, shard := range r.shards {
		shard.addTo(&s)
	}
	return s
}

// addTo adds the counters of one shard.
func (r *shard) addTo(s *Stats) {
	c := &r.count
	s.Streams += c.streams.Load()
	s.StreamsRefused += c.streamsRefused.Load()
	s.StreamsFull += c.flowsFull.Load()
	s.AsksFull += c.asksFull.Load()
	s.Sniffs += c.sniffs.Load()
	s.Sniffed += c.sniffed.Load()
	s.SniffsFull += c.sniffsFull.Load()
	s.SecondTries += c.secondTries.Load()
	s.SecondOpened += c.secondOpened.Load()
	s.Mappings += c.mappings.Load()
	s.MappingsExpired += c.mappingsExpired.Load()
	s.MappingsGone += c.mappingsGone.Load()
	s.Orphans += c.orphans.Load()
	s.MappingsEvicted += c.mappingsEvicted.Load()
	s.MappingsFull += c.mappingsFull.Load()
	s.Reassociations += c.reassociations.Load()
	s.Dropped += c.dgramsDropped.Load()
	s.Refused += c.dgramsRefused.Load()
	s.QueueFull += c.dgramsQueueFull.Load()
	s.Up += c.up.Load()
	s.Down += c.down.Load()
	r.streams.mu.Lock()
	s.StreamsNow += len(r.streams.all)
	r.streams.mu.Unlock()
	r.udp.mu.Lock()
	s.MappingsNow += len(r.udp.all)
	s.Pending += r.udp.dialing
	r.udp.mu.Unlock()
}

// Ended is how many flows have ended, TCP and UDP: each leaves garbage behind. Any goroutine; no lock.
func (r *Router) Ended() (n uint64) {
	for _, s := range r.shards {
		n += s.count.ended.Load()
	}
	return n
}

// Flows lists what there is now, by ID: for status.
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

// UpstreamInfo is an upstream as status shows it. Down: the last flow met a fault of the server's.
type UpstreamInfo struct {
	Name             string
	TCPDown, UDPDown bool
}

// Upstreams lists them in the order of the configuration.
func (r *Router) Upstreams() []UpstreamInfo {
	var all []UpstreamInfo
	for _, up := range r.policy.Load().order {
		all = append(all, UpstreamInfo{up.name, up.tcp.isDown(), up.udp.isDown()})
	}
	return all
}

// RuleInfo is a rule and how often it decided, in TCP flows and datagrams.
type RuleInfo struct {
	Rule string
	Hits uint64
}

// Rules lists the rules in their order, and last what happens to the rest: "default", or "none".
func (r *Router) Rules() []RuleInfo {
	var all []RuleInfo
	p := r.policy.Load()
	for _, v := range append(p.verdicts[:len(p.verdicts):len(p.verdicts)], p.otherwise) {
		all = append(all, RuleInfo{v.rule, v.hits.sum()})
	}
	return all
}
