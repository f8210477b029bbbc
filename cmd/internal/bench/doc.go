package main

// Where the time goes
//
// perf record -g on two shared virtual cores, Linux 6.18, MTU 1500, everything on the two cores: program, viasocks, SOCKS
// server and far end. The shares are of viasocks' own CPU time; what the kernel does for a neighbour inside our
// system calls (the softirq of a veth, the program's receive path behind a TUN write) counts as ours.
//
// D1, one download, 0.95 s/GB:
//
//	44 %  recv from the proxy's socket: half is the copy, 19 % of all is the ACK that recv sends, with what it sets free at the sender
//	26 %  write to the TUN, with the program's whole receive path behind it
//	19 %  gVisor's handling of the program's ACKs (it sends what they set free: counted in the write above too)
//	 4 %  clearing of new 64 KiB chunks in gVisor
//	 2 %  our own code: turns, epoll, FIONREAD
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
// What was tried, medians of four or five interleaved rounds:
//
//   - As many processors (GOMAXPROCS) as there is work for, in place of all: D1 1.38 to 1.03 s/GB and 26 % more of it, a connection
//     153 to 133 µs. The scheduler otherwise wakes a thread for each goroutine that becomes ready.
//   - No entersyscall around the TUN's read and write: D1 1.08 to 0.95, U1 0.72 to 0.63, UDP 13.2 to 10.2 µs. The runtime's
//     monitor took the processor away after 20 µs and stayed awake for it: a fifth of the time of UDP round trips.
//   - One relay loop in place of one for each core: no gain for one flow, a third less for eight downloads.
//   - More processors than cores (GOMAXPROCS=4 on two): nothing gained, 10 % more CPU.
//   - An epoll set inside the Go runtime's poller in place of an eventfd and a thread in epoll_wait: 8.5 µs against 17.9
//     for a round trip through a relay (route/relay).
//
// Open, in the order of what they promise: one ACK for two super-segments (7 % of U1, and one of two TUN writes of a
// ping-pong); gVisor's processor goroutine between the frame reader and the relay loop; the clearing of chunks.
