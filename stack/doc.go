// Package stack is the userspace TCP/IP stack that terminates the captured flows. It is the only importer of gVisor's
// netstack.
//
// The flows are divided into shards by the app's port. A shard has its own queues of the TUN with one reader, a
// gVisor stack (engine), a table of pending SYNs and counters. It holds no lock that the flows of another shard need.
// A frame that arrives on a queue of another shard is handed over through an inbox. This happens to the first frames
// of a flow and to those after a silence, until a frame that the shard writes has moved the flow to its own queues.
// Frames that wait in the old queue at that moment may be overtaken, as in a network with several paths.
//
// # The way in
//
// The shard's reader reads a frame from its tun.Part and parses its IP header once (parseIP). UDP takes the fast path
// directly to Handler.HandlePackets. Everything else enters gVisor as one packet of any length, through an IP layer
// (ipEndpoint) that keeps one state for all addresses. A TCP segment for which gVisor has no endpoint goes to the
// pending table. A SYN becomes a flow.StreamRequest, which is not answered before the upstream has answered (dial
// before accept).
//
// # The way out
//
// The packets of gVisor go through link to tun.Part.Write with their offload header, up to 64 KiB in one frame. UDP
// replies and ICMP errors are built in this package and written without gVisor. The ACK of a short segment or of a FIN
// waits for a segment that carries the same acknowledgement (ackHold).
//
// # Goroutines
//
// Each shard has one reader and gVisor's TCP processors, one for each CPU. A pending dial, a handshake and an idle
// flow have no goroutine.
//
// # Lock order
//
// Within a shard: feeding (held while a frame is in gVisor), then gVisor's own locks, then pendingTable.mu, then
// either a stripe of the budget or the mutex of another shard's inbox. Locks of two shards are never held together,
// except that of an inbox, under which no other lock is taken. The mutex of an ackSlot comes after gVisor's locks; a
// frame may be written under it, and no other lock is taken. The frame reader takes Elsewhere.mu while it holds no
// other lock.
//
// # What the shards share
//
// The shards share the budgets of pending SYNs (a counter, and a lock for a sixteenth of the destinations, taken once
// for each SYN and once when it is answered); the pools of packets and buffers, which the Go runtime keeps for each
// processor; gVisor's list of endpoints that were closed and are not yet gone (tcpip.AddDanglingEndpoint, one lock in
// the process, taken twice for each connection); and the garbage collector. BenchmarkShards on two cores: 1.0 million
// segments a second with one shard, 2.1 million with two, and no time spent waiting for locks in either case. The
// benchmark of the same name in cmd/internal/daemon measures the whole path.
//
// A frame that arrives on another shard's queue is copied and wakes its reader. This is rare where the kernel
// remembers the flows: 4 to 10 of 6,000 to 20,000 frames, with eight UDP sockets and eight downloads in two shards.
//
// The limits at 16 cores are an estimate. The first is the kernel's side: the daemon then has 8 shards, each with two
// queues of 500 frames, so a flow that shares a queue with a flood has only one other queue to move to. The second is
// gVisor's processors: 8 shards have 128 of them, each woken for one segment at a time, so the number of wake-ups
// grows, not lock contention. The third is the lock of the dangling endpoints: some 100 ns twice for each connection,
// which is 2 % of one core at 100,000 connections a second. Two cores cannot show how the shared cache lines
// (reference counts of the pools, the budget's counter) behave across CPU sockets, nor whether the frames of one flow
// stay in order when many readers hand over to each other.
package stack
