package sockstest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
)

// uotName is the name in a CONNECT that asks for UDP over TCP, version 2, of sing-box.
const uotName = "sp.v2.udp-over-tcp.arpa"

// uotLongest is the longest datagram of a client: sing-box reads it into 16 KiB.
const uotLongest = 16 << 10

// WithUDPOverTCP makes the server accept UDP over TCP, version 2, strictly: anything that sing-box's client would
// write differently ends the connection. Without it, the name that asks for it is a name like others.
func WithUDPOverTCP() Option { return func(s *Server) { s.uot = true } }

// overTCP grants x, reads the request and carries datagrams in both directions until the connection ends.
func (s *Server) overTCP(c stream, x exchange, f Fault) {
	if x.Dst.Port != 0 {
		s.answer(c, Reply(1), x.reply(1, Addr{}))
		return
	}
	if !s.answer(c, f, x.reply(0, Addr{})) {
		return
	}
	var head [2]byte // isConnect and the ATYP of the destination
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	if _, err := readAddr(c, head[1]); err != nil || head[0] != 0 {
		s.n.udpBad.Add(1)
		return
	}
	a := &Association{s: s, c: c, req: x.Request, fault: f}
	defer a.close()
	defer context.AfterFunc(s.ctx, a.close)()
	s.mu.Lock()
	s.assocs[a] = struct{}{}
	s.mu.Unlock()
	s.n.assocs.Add(1)
	s.n.assocsOpen.Add(1)
	defer func() {
		s.mu.Lock()
		delete(s.assocs, a)
		s.mu.Unlock()
		s.n.assocsOpen.Add(-1)
	}()
	if f.CloseUDP {
		s.end(c, FIN)
		return
	}
	a.readFrames()
}

// readFrames sends the datagrams of the client to the world until the connection ends.
func (a *Association) readFrames() {
	s, c := a.s, a.c
	buf := make([]byte, uotLongest)
	for {
		dst, payload, err := readFrame(c, buf)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.n.udpBad.Add(1)
			}
			return
		}
		a.mu.Lock()
		end, drop := a.fault.EndUDP, a.fault.DropUDP
		a.mu.Unlock()
		if end != nil && end(dst) {
			return
		}
		to, err := a.target(dst)
		if err != nil || drop {
			s.n.udpBad.Add(1)
			continue
		}
		if u := a.outFor(to.Addr()); u != nil {
			s.n.udpUp.Add(1) // first, so that a test that sees the datagram also sees it counted
			if _, err = u.WriteToUDPAddrPort(payload, to); err == nil {
				continue
			}
			s.n.udpUp.Add(^uint64(0))
		}
		s.n.udpBad.Add(1)
	}
}

var errFrame = errors.New("a malformed frame of UDP over TCP")

// readFrame reads a datagram of a client. The payload is in buf.
func readFrame(r io.Reader, buf []byte) (dst Addr, payload []byte, err error) {
	var b [2]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return Addr{}, nil, err
	}
	atyp, ok := map[byte]byte{0: 1, 1: 4, 2: 3}[b[0]]
	if !ok {
		return Addr{}, nil, errFrame
	}
	if dst, err = readAddr(r, atyp); err != nil {
		return Addr{}, nil, errFrame
	}
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Addr{}, nil, errFrame
	}
	n := int(binary.BigEndian.Uint16(b[:]))
	if n > len(buf) {
		return Addr{}, nil, errFrame
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return Addr{}, nil, errFrame
	}
	return dst, buf[:n], nil
}

// sendFrame sends a datagram to a client of UDP over TCP, byte by byte if the fault requires it.
func (a *Association) sendFrame(f Fault, src Addr, payload []byte) error {
	b := appendAddr(nil, src)
	b[0] = map[byte]byte{1: 0, 4: 1, 3: 2}[b[0]]
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	b = append(b, payload...)
	if f.BadUDP {
		b[0] = 9
	}
	if f.MangleTo != nil {
		f.MangleTo(b)
	}
	a.sending.Lock()
	defer a.sending.Unlock()
	for i := 0; f.Drip > 0 && i < len(b)-1; i++ {
		if !a.s.wait(f.Drip) {
			return io.EOF
		}
		if _, err := a.c.Write(b[i : i+1]); err != nil {
			return err
		}
	}
	if f.Drip > 0 {
		b = b[len(b)-1:]
	}
	_, err := a.c.Write(b)
	return err
}

// OverTCP reports whether the datagrams travel in the connection of the request. There is then no relay.
func (a *Association) OverTCP() bool { return a.relay == nil }

// relayAddr returns the relay's endpoint, which is invalid over TCP.
func (a *Association) relayAddr() netip.AddrPort {
	if a.relay == nil {
		return netip.AddrPort{}
	}
	return unmap(a.relay.LocalAddr())
}
