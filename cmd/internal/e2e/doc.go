// Package e2e has the end-to-end tests: the real viasocks binary, a real kernel TUN, real sockets of a real program.
//
// The test binary runs itself again in a network namespace (and, without root, a user namespace) of its own; there
// sockstest is the proxy, and 203.0.113.0/24 and 2001:db8::/32 on lo are the world:
//
//	┌ app's namespace, made by viasocks run ┐      ┌ the test's namespace ───────────────────────────────┐
//	│ agent: opens sockets, hands them to   │ TUN  │ viasocks ── SOCKS ──▶ sockstest ──▶ 203.0.113.x       │
//	│ the test process by SCM_RIGHTS        ├──────┤                       127.0.0.1     2001:db8::x (lo)  │
//	└───────────────────────────────────────┘      └─────────────────────────────────────────────────────┘
//
// A socket belongs to the namespace in which it was opened, whoever holds it: so a test calls connect() and the rest
// in its own process and still is the captured program.
package e2e
