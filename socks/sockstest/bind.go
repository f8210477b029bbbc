package sockstest

import (
	"context"
	"net"
	"net/netip"
)

// bind listens for one connection from the peer that the client named, and relays it.
func (s *Server) bind(c stream, x exchange, f Fault) {
	at := unmap(c.LocalAddr()).Addr()
	if !at.IsValid() { // a unix socket
		at = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	var ln *net.TCPListener
	err := s.enter(func() (err error) {
		ln, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
		return err
	})
	if err != nil {
		s.answer(c, Reply(1), x.reply(1, Addr{}))
		return
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(s.ctx, dialLimit)
	defer cancel()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	bound := f.Bound
	if bound == nil {
		b := AddrFrom(unmap(ln.Addr()))
		bound = &b
	}
	if !s.answer(c, f, x.reply(0, *bound)) {
		return
	}
	stop := watchGone(c, cancel)
	far, err := ln.AcceptTCP()
	stop()
	if err != nil {
		if ctx.Err() != context.Canceled {
			s.answer(c, Reply(1), x.reply(1, Addr{}))
		}
		return
	}
	defer far.Close()
	second := Fault{Delay: f.Delay, Drip: f.Drip, Extra: f.Extra}
	peer := unmap(far.RemoteAddr())
	if want, err := s.real(ctx, x.Dst); err == nil && !want.Addr().IsUnspecified() && want.Addr().Unmap() != peer.Addr() {
		s.answer(c, Reply(2), x.reply(2, Addr{})) // not the peer that was named
		return
	}
	if !s.answer(c, second, x.reply(0, AddrFrom(peer))) {
		return
	}
	s.relay(c, far)
}
