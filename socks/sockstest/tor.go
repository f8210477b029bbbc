package sockstest

import "net/netip"

// Commands of Tor (its specification "socks-extensions").
const (
	CmdResolve    = 0xf0
	CmdResolvePTR = 0xf1
)

// WithTor makes the server answer RESOLVE, and RESOLVE_PTR from names.
func WithTor(names map[netip.Addr]string) Option {
	return func(s *Server) { s.tor, s.names = true, names }
}

func (s *Server) torResolve(c stream, x exchange, f Fault) {
	var found Addr
	if x.Cmd == CmdResolve {
		ip, err := s.lookup(s.ctx, x.Dst.Name)
		if err != nil {
			s.answer(c, Reply(4), x.reply(4, Addr{}))
			return
		}
		found = Addr{IP: ip}
	} else if found.Name = s.names[x.Dst.IP.Unmap()]; found.Name == "" {
		s.answer(c, Reply(4), x.reply(4, Addr{}))
		return
	}
	if f.Bound != nil {
		found = *f.Bound
	}
	if s.answer(c, f, x.reply(0, found)) {
		s.end(c, FIN)
	}
}
