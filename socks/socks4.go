package socks

import (
	"fmt"
	"net/netip"
	"strings"
)

// Reply codes of SOCKS4 (the memo "SOCKS: A protocol for TCP proxy across firewalls", Y.-D. Lee).
const (
	version4      = 4
	reply4Granted = 0x5a
	reply4Failed  = 0x5b
	reply4NoIdent = 0x5c
	reply4Ident   = 0x5d
	reply4Len     = 8
)

// socks4 is the Handshake of SOCKS4 and 4a. Its phases are sendRequest → recvHead → granted.
type socks4 struct {
	phase phase
	bound Addr
	buf   []byte
	n     int
}

// newSOCKS4 writes the request. The user of l becomes the USERID; SOCKS4 has no password.
func newSOCKS4(p protocol, l *login, cmd Command, dst Addr) (*socks4, error) {
	cannot := func(reply Reply, format string, args ...any) (*socks4, error) {
		return nil, &inexpressible{p, fmt.Sprintf(format, args...), reply}
	}
	if cmd == CmdAssociate {
		return cannot(ReplyCommandNotSupported, "UDP")
	}
	if cmd != CmdConnect && cmd != CmdBind {
		return cannot(ReplyCommandNotSupported, "the command %d", byte(cmd))
	}
	ip, name := dst.IP.Unmap(), dst.Name
	switch {
	case name != "" && p != protoSOCKS4a:
		return cannot(ReplyAddrTypeNotSupported, "a name")
	case strings.ContainsRune(name, 0):
		return cannot(ReplyAddrTypeNotSupported, "a name with a zero byte")
	case name != "":
		ip = netip.AddrFrom4([4]byte{0, 0, 0, 1}) // announces that a name follows
	case ip.Is6():
		return cannot(ReplyAddrTypeNotSupported, "an IPv6 address")
	case p == protoSOCKS4a && namesFollow(ip):
		return cannot(ReplyAddrTypeNotSupported, "the address %v, which stands for a name there", ip)
	}
	b := append(make([]byte, 0, 64), version4, byte(cmd), byte(dst.Port>>8), byte(dst.Port))
	b = append(b, ip.AsSlice()...)
	if l != nil {
		b = append(b, l.user...)
	}
	b = append(b, 0)
	if name != "" {
		b = append(append(b, name...), 0)
	}
	return &socks4{phase: sendRequest, buf: b}, nil
}

// namesFollow reports whether SOCKS4a takes ip as the announcement that a name follows.
func namesFollow(ip netip.Addr) bool {
	b := ip.As4()
	return b[0] == 0 && b[1] == 0 && b[2] == 0 && b[3] != 0
}

// Output implements Handshake.
func (h *socks4) Output() []byte {
	if h.phase != sendRequest {
		return nil
	}
	return h.buf[h.n:]
}

// Sent implements Handshake.
func (h *socks4) Sent(n int) {
	if h.n += n; h.n == len(h.buf) {
		h.Again() // makes room for the first reply
	}
}

// Input implements Handshake.
func (h *socks4) Input() []byte {
	if h.phase != recvHead {
		return nil
	}
	return h.buf[h.n:]
}

// Received implements Handshake. As with SOCKS5, the rest of a refusal is not awaited.
func (h *socks4) Received(n int) error {
	h.n += n
	got := h.buf[:h.n]
	if len(got) > 0 && got[0] != 0 {
		return fmt.Errorf("%w: version %d of a SOCKS4 reply", ErrMalformed, got[0])
	}
	if len(got) < 2 {
		return nil
	}
	switch code := got[1]; code {
	case reply4Granted:
	case reply4Failed:
		return &refusal{"the SOCKS4 server answered 91 (request rejected or failed)", ReplyGeneralFailure}
	case reply4NoIdent:
		return fmt.Errorf("%w: it answered 92 (it finds no identd on this host)", ErrCredentials)
	case reply4Ident:
		return fmt.Errorf("%w: it answered 93 (the identd on this host names another user)", ErrCredentials)
	default:
		return fmt.Errorf("%w: SOCKS4 reply %d", ErrMalformed, code)
	}
	if len(got) == reply4Len {
		h.bound = Addr{IP: netip.AddrFrom4([4]byte(got[4:8])), Port: uint16(got[2])<<8 | uint16(got[3])}
		h.phase = granted
	}
	return nil
}

// Done implements Handshake.
func (h *socks4) Done() bool { return h.phase == granted }

// Bound implements Handshake. It returns DSTIP and DSTPORT of the reply.
func (h *socks4) Bound() Addr { return h.bound }

// Requesting implements Handshake.
func (h *socks4) Requesting() bool { return h.phase == sendRequest }

// Requested implements Handshake.
func (h *socks4) Requested() bool { return h.phase >= recvHead }

// Answered implements Handshake.
func (h *socks4) Answered() bool { return h.phase > recvHead || h.phase == recvHead && h.n > 0 }

// LoggingIn implements Handshake. The user is part of the request.
func (h *socks4) LoggingIn() bool { return false }

// Again implements Handshake.
func (h *socks4) Again() { h.phase, h.buf, h.n = recvHead, make([]byte, reply4Len), 0 }
