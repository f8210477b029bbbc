package main

// Where the time goes
//
// perf record -g on two shared virtual cores, Linux 6.18, MTU 1500, everything on the two cores: program, viasocks, SOCKS
// server and far end. The shares are of viasocks' own CPU time; what the kernel does for a neighbour inside our
// system calls (the softirq of a veth, the program's receive path behind a TUN write) counts as ours.
//
// D1, one download, 0.95 s/GB (before reno, below; 0.73 since, in the same shares):
//
//	44 %  recv from the proxy's socket: half is the copy, 19 % of all is the ACK that recv sends, with what it
//	      sets free at the sender
//	26 %  write to the TUN, with the program's whole receive path behind it
//	19 %  gVisor's handling of the program's ACKs (it sends what they set free: counted in the write above too)
//	 4 %  clearing of new 64 KiB chunks in gVisor
//	 2 %  our own code: turns, epoll, FIONREAD
//
// D8, eight downloads, 1.1 s/GB: the same, and the clearing of chunks is 17 %, since eight flows' chunks are no longer in
// the processor's cache when their turn comes again.
//
// U1, one upload, 0.63 s/GB:
//
//	40 %  send to the proxy's socket, straight from the frame that was read
//	20 %  read from the TUN (the copy)
//	13 %  the ACK of each super-segment, written to the TUN: gVisor has no delayed ACK
//	 9 %  gVisor: IP and TCP of one packet of 64 KiB
//	 5 %  a fresh chunk for the next frame, most of it clearing
//
// A new connection, 117 to 122 µs, 33 system calls:
//
//	25 %  the SOCKS dial: 13 % of all is connect() with the proxy's accept behind it, 10 % the two exchanges
//	25 %  the relay: the first bytes, two FINs, close
//	14 %  the handshake with the app (gVisor's forwarder, one goroutine for its time)
//	13 %  writes to the TUN, five for each connection
//	12 %  the frame reader
//
// UDP round trip of 64 bytes, 10.2 µs:
//
//	43 %  sendmmsg to the relay, with the proxy's receive path behind it
//	21 %  write to the TUN, with the program's behind it
//	18 %  waiting: epoll of the Go runtime and of the loop
//	 1 %  our own code
//
// A new connection beside N addresses in use, one connection after another, three interleaved rounds on a busy machine. The
// figures are CPU in µs with gVisor's table of addresses filled in advance, and with an IP layer that needs no table (stack):
//
//	N = 0        IPv4 1,270 and 1,130    IPv6 1,210 and 980
//	N = 9,000    IPv4 1,100 and 1,120    IPv6 1,110 and 900
//
// What was found to walk over all of something, and no longer does: gVisor's lookup of an address and its list of addresses
// (stack, ipEndpoint); connect(2), over the local ports that are taken (socks, allPorts); the count of associations in the
// making, each second (route); the kernel's answer about one UDP socket, over its whole table of them, for each mapping whose
// socket was closed (route, sweepSockets).
//
// What still does, each once in a while and none for a packet or a connection: the sweep of UDP mappings, an eighth of them each
// second, and the question which UDP sockets there are, every five seconds; the sweep of TCP flows, a thirtieth each second,
// with a question to the kernel for each that does not move; route/dns, over the questions that wait, at each tick; status,
// over all flows; the garbage collector. A search of some forty steps is what it takes to ask gVisor how much of a stream is
// not acknowledged (Queued).
//
// The whole host (up) in place of one program (run), in the same namespaces: the rules, the filter and conntrack cost a
// round trip of TCP 16.6 µs in place of 14.3, one of UDP 10.6 in place of 9.3, a connection 129 in place of 108; D1 and U1
// the same within 3 %.
//
// Allocations, every 512th byte sampled (runtime/pprof): none of ours for a segment or a datagram. gVisor made a list of one
// for each frame that it sent, and no longer does since the link is its own queueing discipline. A new connection makes
// some 66 objects: about half are gVisor's endpoint, handshake, sender and timers, 6 the route's, 2 the hash of the ISN.
//
// Blocking: of D1, U1 and UDP nobody waits on a channel or a lock but those whose work is a timer; the frame reader and the loops
// wait in the runtime's poller. A new connection waited in gVisor's handshake for the program's ACK (0.3 ms at 5,500 a
// second), in the one goroutine that it had; it has none now. Contended locks: under 0.1 ms in 2.5 s in all four.
//
// What was tried, medians of four or five interleaved rounds:
//
//   - reno in place of cubic toward the app: D1 0.77 to 0.66 s/GB, D8 1.13 to 1.03. HyStart had ended slow start at 47
//     segments, and 40 % of the super-segments were cut at the window's edge: frames of 40 KiB in place of 64.
//   - A send buffer of 1 MiB at most in place of 4: the same throughput, and a small answer beside eight downloads waits 8 ms
//     in place of 20 (native: 22). 512 KiB: 5 ms, but a tenth less of one download. A receive buffer of 1 MiB: an upload
//     0.62 to 0.75 s/GB.
//   - One chunk in place of two for each flow and turn while others wait: D8 1.17 to 1.06 s/GB; with two, or eight, for a
//     flow alone no difference, with one a fifth less.
//   - As many processors (GOMAXPROCS) as there is work for, in place of all: D1 1.38 to 1.03 s/GB and 26 % more of it,
//     a connection 153 to 133 µs. The scheduler otherwise wakes a thread for each goroutine that becomes ready.
//   - No entersyscall around the TUN's read and write: D1 1.08 to 0.95, U1 0.72 to 0.63, UDP 13.2 to 10.2 µs. The runtime's
//     monitor took the processor away after 20 µs and stayed awake for it: a fifth of the time of UDP round trips.
//   - One relay loop in place of one for each core: no gain for one flow, a third less for eight downloads.
//   - More processors than cores (GOMAXPROCS=4 on two): nothing gained, 10 % more CPU.
//   - Sixteen queues for the TUN in place of one, read in turn: twenty sockets that ask beside a flood had 250 answers
//     a second of 2,000, now 1,800 (native: 1,860). A connection costs the same, a round trip 4 to 6 % more: the kernel
//     hashes each frame, to choose its queue. Part of it: the frame reader steps back after 128 frames, until the
//     runtime has looked for others who could run; answers had waited for that up to 50 ms. Reading on and throwing the
//     flood away, with one queue of 4,096 frames, gave 1,000 to 1,150.
//   - An epoll set inside the Go runtime's poller in place of an eventfd and a thread in epoll_wait: 8.5 µs against 17.9
//     for a round trip through a relay (route/relay).
//
// What gained nothing, and is not there:
//
//   - ACKs of small segments held for 1 ms, so that the answer carries them: 1.2 writes to the TUN for a round trip in place
//     of 2.0, but 2 to 3 % in throughput at most, and a program that writes twice without TCP_NODELAY waits.
//   - sendmsg for one datagram in place of sendmmsg: 9.9 and 10.0 µs.
//   - Giving the processor away (Gosched) after each turn: D8 the same, D1 a tenth less.
//   - The loop keeps the frame reader waiting while it has work, since the runtime looks for readable descriptors only when
//     nothing else runs. Parking it every 64 or 256 KiB until the runtime has looked: the small answer beside eight
//     downloads waits 4.2 or 4.8 ms in place of 7.9, and the throughput is the same. It is below native's 22 already.
//
// Open, in the order of what they promise: the clearing of chunks, which gVisor does for each; its processor goroutine
// between the frame reader and the relay loop.
