package sockstest

// uotName is the name that a client of UDP over TCP, version 2, asks for (sing-box's documentation of its protocol).
const uotName = "sp.v2.udp-over-tcp.arpa"

// overTCP carries datagrams inside the stream.
func (s *Server) overTCP(c stream, x exchange, f Fault) { s.connect(c, x, f) }
