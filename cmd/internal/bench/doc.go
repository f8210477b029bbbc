package main

// Where the time goes
//
// The profiles below were taken with perf record -g on two shared virtual cores with Linux 6.18 and an MTU of 1500.
// Program, viasocks, SOCKS server and far end ran on these two cores. The shares are parts of viasocks' own CPU time. What
// the kernel does for a neighbour inside our system calls counts as ours: the softirq of a veth, or the program's receive
// path behind a write to the TUN.
//
// D1 is one download. It took 0.95 s/GB with cubic, and takes 0.73 with reno (see below) in the same shares:
//
//	44 %  recv from the proxy's socket: half of this is the copy; the ACK that recv sends, with what it lets the
//	      sender send, is 19 % of the total
//	26 %  write to the TUN, with the program's receive path behind it
//	19 %  gVisor's handling of the program's ACKs; the segments that they let it send are counted in the write, too
//	 4 %  clearing new chunks of 64 KiB in gVisor
//	 2 %  our own code: turns, epoll, FIONREAD
//
// D8 is eight downloads, at 1.1 s/GB. It has the same shares, except that clearing chunks is 17 %: the chunks of eight
// flows have left the processor's cache when their turn comes again.
//
// U1 is one upload, at 0.63 s/GB:
//
//	40 %  send to the proxy's socket, directly from the frame that was read
//	20 %  read from the TUN (the copy)
//	13 %  the ACK of each super-segment, which is written to the TUN: gVisor has no delayed ACK
//	 9 %  gVisor: IP and TCP of one packet of 64 KiB
//	 5 %  a new chunk for the next frame, which is mostly clearing
//
// A new connection took 117 to 122 µs and 33 system calls:
//
//	25 %  the SOCKS dial: connect() with the proxy's accept behind it is 13 % of the total, the two exchanges are 10 %
//	25 %  the relay: the first bytes, two FINs, close
//	14 %  the handshake with the app in gVisor, which used a goroutine at that time
//	13 %  writes to the TUN, five for each connection
//	12 %  the frame reader
//
// A UDP round trip of 64 bytes took 10.2 µs:
//
//	43 %  sendmmsg to the relay, with the proxy's receive path behind it
//	21 %  write to the TUN, with the program's receive path behind it
//	18 %  waiting in the epoll sets of the Go runtime and of the loop
//	 1 %  our own code
//
// The next table has the CPU time in µs of a new connection while N addresses are in use, one connection after another, in
// three interleaved rounds on a busy machine. The first figure is with gVisor's table of addresses, filled in advance; the
// second is with our IP layer, which needs no table (package stack):
//
//	N = 0        IPv4 1,270 and 1,130    IPv6 1,210 and 980
//	N = 9,000    IPv4 1,100 and 1,120    IPv6 1,110 and 900
//
// These walks were found and removed: gVisor's look-up of an address and its list of addresses (stack, ipEndpoint);
// connect(2) over the local ports that are taken (socks, allPorts); the count of pending associations, once a second
// (route); and the kernel's answer about one UDP socket, for which it walked over all UDP sockets, for each mapping whose
// socket was closed (route, sweepSockets).
//
// These walks remain. None of them happens for a packet or a connection: the sweep of an eighth of the UDP mappings each
// second; the query for all UDP sockets every five seconds; the sweep of a thirtieth of the TCP flows each second, with a
// query to the kernel for each flow that does not move; route/dns over the pending questions at each tick; status over
// all flows; and the garbage collector. To find out how much of a stream is unacknowledged, Queued asks gVisor in a search
// of some forty steps.
//
// In the same namespaces, the whole host (up) costs more than one program (run), because of the rules, the filter and
// conntrack: a TCP round trip takes 16.6 µs instead of 14.3, a UDP round trip 10.6 instead of 9.3, and a connection 129
// instead of 108. D1 and U1 are the same within 3 %.
//
// The next table has the CPU time of both ends, viasocks and the kernel for traffic that a rule with direct lets out under up, as
// the median of the ratios to no viasocks at all, in three interleaved rounds of 0.8 s on a machine that was not quite idle. The
// least and the greatest ratio are in brackets; the last column is the rate.
//
//	download, in the kernel       1.08 (1.03 to 1.27)   0.90
//	download, carried             2.80 (2.20 to 3.47)   0.36
//	connection, in the kernel     1.03 (1.02 to 1.59)   0.90
//	connection, carried           3.53 (2.95 to 3.59)   0.25
//	UDP round trip, in the kernel 1.28 (1.06 to 2.01)   0.73
//	UDP round trip, carried       2.46 (2.45 to 3.42)   0.39
//
// What comes from behind the host (behind:) also passes two look-ups in the filter's memory of who has forwarded something
// into the TUN. The update for a frame takes 0.25 to 0.3 µs: the fastest twentieth of 1,200 batches of datagrams that a
// router forwards took 4.17 µs a datagram without the rule, 4.47 with it, and 4.16 without it again. That is 0.4 % of the
// CPU time of all for a UDP round trip of 64 bytes (78 µs) and 1 % for a datagram of floodup (28 µs). A look-up that
// changes nothing takes as long.
//
// A byte on a connection that a peer opened by BIND was as dear as on one that the program opened, as far as three such rounds
// can tell: 0.83, 0.97, 0.99 and 1.18 times the CPU time of D1, D8, U1 and U8, each ratio between 0.62 and 1.25.
//
// Allocations were sampled once in 512 bytes (runtime/pprof). Our code allocates nothing for a segment or a datagram.
// gVisor made a list of one element for each frame that it sent; it has not done so since the link became its own queueing
// discipline. A new connection makes some 66 objects: gVisor's endpoint, handshake, sender and timers are about half of
// them, route makes 6, and the hash of the ISN makes 2.
//
// In D1, U1 and UDP, only goroutines that serve a timer wait for a channel or a lock; the frame reader and the loops wait in
// the runtime's poller. A new connection waited 0.3 ms, at 5,500 connections a second, for the program's ACK in the one
// goroutine of gVisor's handshake; a handshake has no goroutine now. The time in contended locks was below 0.1 ms in 2.5 s
// in all four cases.
//
// These changes were kept. The figures are medians of four or five interleaved rounds:
//
//   - reno instead of cubic toward the app: D1 from 0.77 to 0.66 s/GB, D8 from 1.13 to 1.03. HyStart had ended slow start
//     at 47 segments. 40 % of the super-segments were then cut at the edge of the window: frames of 40 KiB instead of 64.
//   - A send buffer of at most 1 MiB instead of 4: the throughput is the same, and a small answer beside eight downloads
//     waits 8 ms instead of 20 (native: 22). With 512 KiB it waits 5 ms, but one download loses a tenth. A receive buffer
//     of 1 MiB was not kept: an upload took 0.75 s/GB instead of 0.62.
//   - One chunk instead of two for each flow and turn while others wait: D8 from 1.17 to 1.06 s/GB. For a single flow, two
//     and eight chunks are the same, and one chunk costs a fifth.
//   - As many processors (GOMAXPROCS) as there is work for, instead of all: D1 from 1.38 to 1.03 s/GB with 26 % more
//     throughput, a connection from 153 to 133 µs. Otherwise the scheduler wakes a thread for each goroutine that becomes
//     ready.
//   - No entersyscall around reads and writes of the TUN: D1 from 1.08 to 0.95, U1 from 0.72 to 0.63, UDP from 13.2 to
//     10.2 µs. The runtime's monitor took the processor away after 20 µs and stayed awake to do so, which was a fifth of
//     the time of UDP round trips.
//   - Sixteen queues for the TUN instead of one, read in turn: twenty sockets that ask beside a flood got 250 answers a
//     second of 2,000, and get 1,800 now (native: 1,860). A connection costs the same, and a round trip 4 to 6 % more,
//     because the kernel hashes each frame to choose its queue. Part of the gain comes from the frame reader, which steps
//     back after 128 frames until the runtime has looked for other work; answers had waited up to 50 ms for that. Reading
//     on with one queue of 4,096 frames and dropping the flood gave 1,000 to 1,150 answers.
//   - An epoll set inside the Go runtime's poller instead of an eventfd and a thread in epoll_wait: 8.5 µs instead of 17.9
//     for a round trip through a relay (route/relay).
//   - One relay loop for each core instead of a single one: one flow gains nothing, and eight downloads gain a half.
//
// These changes gained too little and were not kept:
//
//   - Holding the ACKs of small segments for 1 ms, so that the answer carries them: 1.2 writes to the TUN for a round trip
//     instead of 2.0, but 3 % of throughput at most, and a program that writes twice without TCP_NODELAY waited. (Since
//     then, ackHold in package stack holds the ACK of a single segment, for at most 4 ms.)
//   - More processors than cores (GOMAXPROCS=4 on two cores): no gain, and 10 % more CPU.
//   - sendmsg instead of sendmmsg for one datagram: 9.9 and 10.0 µs.
//   - Yielding the processor (Gosched) after each turn: D8 the same, D1 a tenth less.
//   - Parking the loop after every 64 or 256 KiB until the runtime has looked for readable descriptors, which it does only
//     when nothing else runs: the small answer beside eight downloads waits 4.2 or 4.8 ms instead of 7.9, with the same
//     throughput. That was already less than native's 22 ms.
//
// Two things remain that promise a gain, the larger one first: gVisor clears each new chunk, and its processor goroutine
// stands between the frame reader and the relay loop.
