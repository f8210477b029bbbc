// Package conform finds out what a SOCKS server really does, by using it with a far end that reports what arrived.
//
//	far, err := conform.ListenFar(addrs…)       // on a host behind the server: Far.Ends says where it listens
//	report, err := conform.Probe(ctx, conform.Config{Server: server, Ends: ends})
//	report.WriteText(os.Stdout)
//
// The probe asks for a port that is open, for one that is closed, for a host that cannot be reached and for one that
// never answers. It records the code, the time, and whether the server granted the request before it had dialled. It
// passes a half-close and a reset in both directions, has a connection made to it by BIND, and examines UDP ASSOCIATE
// as RFC 5780 examines a NAT: mapping, filtering, the largest datagram in each direction, names, and what happens to
// an association when one of its datagrams cannot be sent.
//
// Every read has a limit and every wait a deadline, so a probe ends whatever the server does. The requests are valid
// by RFC 1928 and RFC 1929 and the documents of SOCKS4 and 4a. Package socks speaks the handshakes; only a greeting
// alone, for the method that the server chooses, is written here byte by byte.
package conform
