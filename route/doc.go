// Package route decides which upstream carries a flow, and keeps the state of the flows: for TCP the pending dial and
// the flow table, for UDP the mappings and their associations.
//
// The parts, in a packet's order:
//
//	Rule         a line of policy; the first that matches decides: an upstream, reject, drop
//	Upstream     what carries a flow: SOCKS servers, or direct
//	Router       takes flows from the stack (stack.Handler) and gives them to an upstream and a relay loop
//
// A TCP flow (streams.go): HandleStream takes the verdict, tells the upstream to dial and returns. The upstream's answer
// is turned into Accept (by the relay loop) or into the refusal that the app would have met directly (outcome.go).
// Neither a pending dial nor an idle flow holds a goroutine.
//
// UDP (udp.go, mapping.go): one mapping for each app endpoint, whatever the destination, and in it one association for
// each upstream that its destinations' verdicts ask for (RFC 4787: endpoint-independent mapping and filtering).
//
// Goroutines of a Router: Run itself (opens and closes associations, expires mappings), one that writes the flow log,
// and those of route/dns. The frame readers call HandleStream and HandlePackets; relay loops call the sinks.
//
// # Shards
//
// The Router has as many shards as the stack (shard.go). A shard owns the table of its TCP flows, its mappings with their caches
// of verdicts, its counters, its writers toward the apps, and its share of the relay loops. The stack says which shard a frame
// belongs to, by the app's port, so a flow stays in one shard and on one of its loops from the SYN or the first datagram to the
// end. A datagram takes the lock of its own shard's mappings, once for each burst. The lock is held while the burst is sent, so
// that a link is used by one goroutine at a time; besides the one frame reader of the shard only Run wants it, to open and close
// associations, and who asks for the status.
//
// Lock order: Router.reload, then mappings.mu of the shards by their index, then all others: whoever holds one of these takes
// neither of the first two. Only a new policy takes the lock of all shards. Whoever needs room for a mapping holds the lock of
// one shard and only tries those of the others.
//
// All shards write to these things: the numbers of flows and of mappings, for their limits, and the next ID, each an atomic once
// for each flow; the queue of the flow log and that of the decisions, where they are wanted; the mailbox of Run, for each
// association that begins or ends; what socks.Group remembers of its servers, which takes no lock while all of them are well; the
// table of names (for reading) and the asker, where rules ask for names or programs; and route/dns.
//
// BenchmarkShards in cmd/internal/daemon sends frames through stack and router without the kernel. Two cores with nothing else
// to do gave 3.1 million datagrams a second with one shard and 4.3 million with two, and no time was spent waiting for locks.
// Connections that were refused at once: 190,000 a second with one shard and 270,000 with two, which waited 14 ns for each.
//
// On paper, the next limit of this package on sixteen cores is Run: one goroutine for all shards, which has two events for each
// mapping that begins and one for each that ends, and looks at all mappings every five seconds. How many it can do in a second
// has not been measured. Then come the atomics for each flow, whose cache lines move between the cores. What happens between
// processor sockets, and whether eight readers are equally busy where few ports have most of the traffic, cannot be shown on two
// cores.
//
// Port 53 is answered by route/dns over UDP whatever address was asked. TCP to port 53 is carried to the first resolver if that
// is of tcp://, and else answered by route/dns too. Both come before any rule is looked at. With RelayDNS questions go to the
// server that was asked.
package route
