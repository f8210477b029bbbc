// Package servicetest contains the tests of the units for systemd: what they start, what their sandbox permits, and
// what happens to the host when the service crashes, hangs, is reloaded and is stopped. TestMachined is about machines of
// systemd-nspawn, which systemd-machined knows.
//
// A real systemd is the first process of namespaces that the test makes, as in a container, over the root of this
// machine with an overlay above it. Nothing that it changes is seen outside, and it cannot change settings of the
// kernel other than those of its own network:
//
//	machine 198.51.100.2 ── eth0 ──── eth0 ── world 198.51.100.1: the proxy; beyond it 203.0.113.80: HTTP
//
// The world counts the packets that the machine sends to 203.0.113.80 without the proxy.
package servicetest
