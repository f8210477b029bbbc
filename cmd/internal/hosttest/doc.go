// Package hosttest has the tests of `viasocks up`: does a host leak, does it stay reachable, does it come back.
//
// The test binary runs itself again in namespaces of its own (network, mounts, process ids; without root also users), and
// makes these network namespaces there:
//
//	ctr ──── br0 ┐                recorder
//	172.20.0.2   │ host             │         ┌ proxy  192.0.2.2, 2001:db8:2::2: sockstest
//	fd00:20::2   │ viasocks0        ▼         │
//	             │ eth0 ───────── host0 router┤
//	               10.77.0.2                  └ world  203.0.113.0/24, 2001:db8:f::/64: every address is there
//	               198.51.100.2
//	               2001:db8:1::2, fd77::2
//
// The recorder is outside of the host, on its only uplink, and sees each frame (AF_PACKET). What may leave is a short
// list of types and ports; everything else is a leak, and is laid to a probe by a canary in its payload or by its
// destination, which no other probe has. A positive control without viasocks shows that each probe is seen.
//
// Tests that spend most of their time waiting, such as those with DHCP clients, run beside each other: each of them is a
// process of its own, which makes the same world once more in its own namespaces (see apart). They start when all other
// tests are over.
package hosttest
