// Package hosttest contains the tests of `viasocks up`: whether a host leaks, stays reachable, and is restored.
//
// The test binary runs itself again in its own namespaces (network, mounts, process ids; without root also users),
// and creates these network namespaces there:
//
//	ctr ──── br0 ┐                recorder
//	172.20.0.2   │ host             │         ┌ proxy  192.0.2.2, 2001:db8:2::2: sockstest
//	fd00:20::2   │ viasocks0        ▼         │
//	             │ eth0 ───────── host0 router┤
//	               10.77.0.2                  └ world  203.0.113.0/24, 2001:db8:f::/64: every address is there
//	               198.51.100.2
//	               2001:db8:1::2, fd77::2
//
// The recorder is outside of the host, on its only uplink, and sees each frame (AF_PACKET). A short list of types and
// ports may leave the host; everything else is a leak. A leak is assigned to a probe by a canary in its payload, or
// by its destination, which no other probe uses. A positive control without viasocks shows that each probe is seen.
//
// Almost all tests mostly wait. They run in parallel: each is its own process, which creates the same network once more in
// its own namespaces (see apart). They start after the few others, such as the one that measures what watchers cost.
package hosttest
