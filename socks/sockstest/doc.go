// Package sockstest is a SOCKS5 server (RFC 1928, RFC 1929) for tests: a real one, which dials and relays, and one that
// misbehaves on demand.
//
//	srv, err := sockstest.Listen("tcp", "127.0.0.1:0")
//	defer srv.Close()
//	srv.SetFault(func(r sockstest.Request) sockstest.Fault {
//		if r.Dst.Port == 81 {
//			return sockstest.Reply(5)
//		}
//		return sockstest.Fault{}
//	})
//
// What real servers do wrong it does right, so that a test sees the client's doing alone: a reset is passed on as a reset
// and FIN as FIN, each way for itself and without a time limit; an association has endpoint-independent mapping and
// filtering and tells each datagram's true source.
//
// It shares no code with package socks, so that no mistake is made twice. Goroutines are used freely; memory of an idle
// connection is small, so that ten thousand of them can be held.
package sockstest
