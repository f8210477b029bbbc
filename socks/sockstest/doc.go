// Package sockstest is a SOCKS5 server (RFC 1928, RFC 1929) for tests. It really dials and relays, and misbehaves on
// demand.
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
// It does right what real servers do wrong, so that a test sees only the behaviour of the client: a reset is passed
// on as a reset and FIN as FIN, each direction separately and without a time limit; an association has
// endpoint-independent mapping and filtering, and gives the true source of each datagram.
//
// It shares no code with package socks, so that no mistake is in both. It uses goroutines freely, but little memory
// for an idle connection, so that it can hold ten thousand of them.
package sockstest
