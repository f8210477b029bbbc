// Package route decides which upstream carries a flow, and keeps the state of the flows: for TCP the pending dial and
// the flow table, for UDP the mappings and their associations.
//
// The parts, in the order in which a packet meets them:
//
//	Rule         a line of policy; the first that matches decides: an upstream, reject, drop
//	Upstream     what carries a flow: SOCKS servers, or direct
//	Router       takes flows from the stack (stack.Handler) and gives them to an upstream and a relay loop
//
// The Router itself only hands on what comes in. Its parts have a file each:
//
//	base           configuration, clock, log and end, which all parts use (base.go)
//	decider        the policy in force, and the verdicts by it (decider.go, policy.go, verdict.go)
//	port53         the server of route/dns and its ways to the resolvers (port53.go, questions.go)
//	streams        the flow table of TCP of one shard; allStreams has what they share (streams.go, sniffing.go)
//	mappings       the mappings of one shard (udp.go, mapping.go, mapping_life.go)
//	associations   the associations of all mappings (associations.go, queue.go)
//	goneSearch     the search for flows whose program is gone (gone.go)
//
// TCP: HandleStream makes the verdict, tells the upstream to dial and returns. The upstream's answer
// becomes Accept (by the relay loop) or the refusal that the app would have met directly (outcome.go). Neither a
// pending dial nor an idle flow holds a goroutine.
//
// UDP: each app endpoint has one mapping, whatever the destination, and the mapping has one
// association for each upstream that the verdicts on its destinations require (RFC 4787: endpoint-independent mapping
// and filtering).
//
// Goroutines of a Router: Run itself (opens and closes associations, expires mappings), one that writes the flow log,
// and those of route/dns. The frame readers call HandleStream and HandlePackets; relay loops call the sinks.
//
// # Shards
//
// The Router has as many shards as the stack (shard.go). A shard owns the table of its TCP flows, its mappings with
// their caches of verdicts, its counters, its writers to the apps, and its share of the relay loops. The stack
// chooses the shard of a frame by the app's port, so a flow stays in one shard and on one of its loops from the SYN
// or the first datagram to the end. A burst of datagrams takes the lock of its own shard's mappings once. The lock is
// held while the burst is sent, so that only one goroutine uses a link at a time. Besides the frame reader of the
// shard, only Run needs the lock, to open and close associations, and the status.
//
// # Lock order
//
// decider.reload comes first, then mappings.mu of the shards in the order of their index, then all other locks: a
// goroutine that holds one of the others takes neither of the first two. Only a new policy takes the locks of all
// shards. A goroutine that needs room for a mapping holds the lock of one shard, and only tries those of the others.
//
// # What the shards share
//
// All shards write to the following: the numbers of flows and mappings, for their limits, and the next ID, each an
// atomic that is written once for each flow; the queues of the flow log and of the decisions, if they are wanted; the
// mailbox of Run, for each association that begins or ends; the server states of socks.Group, which needs no lock
// while all servers are well; the table of names (for reading) and the asker, if rules need names or programs; and
// route/dns.
//
// BenchmarkShards in cmd/internal/daemon sends frames through stack and router without the kernel. Two otherwise idle
// cores processed 3.1 million datagrams a second with one shard and 4.3 million with two, and no time was spent
// waiting for locks. For connections that were refused at once the result was 190,000 a second with one shard and
// 270,000 with two, which waited 14 ns for each.
//
// The limits on sixteen cores are an estimate. The first in this package is Run: one goroutine for all shards, with
// two events for each mapping that begins and one for each that ends, which checks all mappings every five seconds.
// How many it can handle in a second has not been measured. Next are the atomics for each flow, whose cache lines
// move between the cores. Two cores cannot show what happens between processor sockets, nor whether eight readers are
// equally busy if a few ports have most of the traffic.
//
// # Port 53
//
// route/dns answers port 53 over UDP, whatever address was asked. TCP to port 53 is carried to the first resolver if
// that is of kind tcp://, and is otherwise answered by route/dns as well. Both are handled before any rule is
// evaluated. With RelayDNS, questions go to the server that was asked.
package route
