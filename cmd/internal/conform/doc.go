// Package conform finds out what a SOCKS server really does, by using it against a far end that tells what arrived.
//
//	far, err := conform.ListenFar(addrs…)       // on a host behind the server: Far.Ends says where it listens
//	report, err := conform.Probe(ctx, conform.Config{Server: server, Ends: ends})
//	report.WriteText(os.Stdout)
//
// The probe asks for a port that is open, for one that is closed, for a host that cannot be reached and for one that never
// answers, and notes the code, the time, and whether the server granted the request before it had dialled. It passes a
// half-close and a reset both ways, has a connection made to it by BIND, and looks at UDP ASSOCIATE as RFC 5780 looks at a
// NAT: mapping, filtering, the largest datagram each way, names, and what becomes of an association when one of its
// datagrams cannot be sent.
//
// Every read has a bound and every wait a deadline, so that a probe ends whatever the server does. The requests are valid
// by RFC 1928 and RFC 1929 and the documents of SOCKS4 and 4a. Package socks speaks the handshakes; only a greeting by itself,
// for the method that the server chooses, is written here byte by byte.
package conform
