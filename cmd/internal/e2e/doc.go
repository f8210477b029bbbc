// Package e2e contains the end-to-end tests: the real viasocks binary, a real kernel TUN, and real sockets of a real
// program.
//
// The test binary runs itself again in its own network namespace (and, without root, user namespace). There sockstest
// is the proxy, and 203.0.113.0/24 and 2001:db8::/32 on lo are the world:
//
//	┌ app's namespace, made by viasocks run ┐      ┌ the test's namespace ───────────────────────────────┐
//	│ agent: opens sockets, hands them to   │ TUN  │ viasocks ── SOCKS ──▶ sockstest ──▶ 203.0.113.x       │
//	│ the test process by SCM_RIGHTS        ├──────┤                       127.0.0.1     2001:db8::x (lo)  │
//	└───────────────────────────────────────┘      └─────────────────────────────────────────────────────┘
//
// A socket belongs to the namespace in which it was opened, whichever process holds it. A test can therefore call
// connect() and the like in its own process and still be the captured program.
package e2e
