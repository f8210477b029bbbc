// Package stack is the userspace TCP/IP stack that ends the captured flows, and the only importer of gVisor's netstack.
//
// The flows are divided into shards, by the app's port. A shard has queues of the TUN and the one reader of their frames, a
// gVisor stack (engine), a table of pending SYNs and counters, and no lock that another shard's flows need. What comes by a
// queue of another shard is handed over (inbox): the first frames of a flow and those after a silence, until a frame that the
// shard writes has moved the flow to its queues. Frames that wait in the old queue at that moment may be overtaken, as on a
// network with several paths.
//
// A frame's way in: the shard's reader reads it from its tun.Part and looks at its IP header once (parseIP); UDP goes by the
// fast path straight to Handler.HandlePackets; everything else goes into gVisor as one packet, however long, by way of an IP
// layer (ipEndpoint) that has one state for all addresses. A TCP segment for which gVisor has no endpoint comes to the pending
// table: a SYN becomes a flow.StreamRequest and is not answered before the upstream has (dial before accept).
//
// A frame's way out: gVisor's packets go by link to tun.Part.Write with their offload header, up to 64 KiB in one
// frame; UDP replies and ICMP errors are built here and written past gVisor.
//
// What has a goroutine: each shard's reader, and gVisor's TCP processors (one for each CPU in each shard). A pending dial, a
// handshake and an idle flow have none.
//
// Lock order of a shard: feeding (a frame is in gVisor), then gVisor's own, then pendingTable.mu, then a stripe of the budget, or
// the mutex of another shard's inbox. No two shards' locks are held together, but for that of an inbox, which is a leaf.
//
// What all shards have in common: the budgets of pending SYNs (a counter, and a lock for a sixteenth of the destinations, once
// for each SYN and once when it is answered); the pools of packets and buffers, which the Go runtime keeps for each processor;
// gVisor's list of endpoints that were closed and are not yet gone (tcpip.AddDanglingEndpoint, one lock in the process, twice
// for each connection); and the garbage collector. BenchmarkShards on two cores: 1.0 million segments a second with one shard,
// 2.1 million with two, no time spent waiting for locks with either. The whole path has a benchmark of the same name in
// cmd/internal/daemon.
//
// A frame that comes by another shard's queue is copied, and wakes its reader. That is rare where the kernel remembers the flows:
// 4 to 10 of 6,000 to 20,000 frames, with eight sockets of UDP and eight downloads in two shards.
//
// On paper, the next limit at 16 cores is the kernel's side first: the daemon then has 8 shards, each with two queues of 500
// frames, so that whoever shares a queue with a flood has one other queue to be moved to. Then gVisor's processors, of which 8
// shards have 128, each woken for a segment at a time, so that wake-ups and not locks are what grows. Then the lock of the
// dangling endpoints, some 100 ns twice for each connection, which is 2 % of one core at 100,000 connections a second. Two cores
// cannot show how the shared cache lines (reference counts of the pools, the budget's counter) behave across sockets, nor whether
// frames of one flow come in order when many readers hand over to each other.
package stack
