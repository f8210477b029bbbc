package socks

import (
	"fmt"
	"net/netip"
)

// Command is the CMD field of a request, RFC 1928 section 4.
type Command byte

// The commands that a Handshake can send.
const (
	CmdConnect   Command = 1
	CmdBind      Command = 2
	CmdAssociate Command = 3
)

const (
	version     = 5
	authVersion = 1 // RFC 1929

	methodNone = 0
	methodUser = 2
	methodFail = 0xff

	// headLen is the length of a reply up to and including the length byte of a name. Every well-formed reply is
	// longer.
	headLen = 5
)

// phase is the message that is being sent or received. The phases follow each other from left to right; the two in
// brackets are used only if the server asks for a user and a password.
//
//	sendGreeting → recvMethod → [sendLogin → recvLogin →] sendRequest → recvHead → recvTail → granted
type phase uint8

const (
	sendGreeting phase = iota
	recvMethod
	sendLogin
	recvLogin
	sendRequest
	recvHead
	recvTail
	granted
)

// socks5 is the Handshake of RFC 1928 and RFC 1929. It must not be copied after first use.
type socks5 struct {
	phase phase
	whole bool // sendGreeting sends all messages: see pipeline
	cmd   Command
	login *login
	dst   Addr
	bound Addr
	buf   []byte   // the message of this phase: bytes to send, or room for bytes to receive
	n     int      // how much of buf was sent or received
	room  [64]byte // storage for buf, if the message has an address or a short name
}

func (h *socks5) start(l *login, cmd Command, dst Addr) {
	*h = socks5{cmd: cmd, login: l, dst: dst}
	h.buf = append(h.room[:0], version, 1, methodNone)
	if l != nil {
		h.buf = append(h.buf[:1], 2, methodNone, methodUser)
	}
}

// Output implements Handshake.
func (h *socks5) Output() []byte {
	switch h.phase {
	case sendGreeting, sendLogin, sendRequest:
		return h.buf[h.n:]
	}
	return nil
}

// Sent implements Handshake.
func (h *socks5) Sent(n int) {
	if h.n += n; h.n < len(h.buf) {
		return
	}
	switch h.phase {
	case sendGreeting:
		if h.whole {
			clear(h.buf) // of sendLogin, too
		}
		h.expect(recvMethod, 2)
	case sendLogin:
		clear(h.buf) // do not keep the password in memory
		h.expect(recvLogin, 2)
	case sendRequest:
		h.expect(recvHead, headLen)
	}
}

// Input implements Handshake.
func (h *socks5) Input() []byte {
	switch h.phase {
	case recvMethod, recvLogin, recvHead, recvTail:
		return h.buf[h.n:]
	}
	return nil
}

// Received implements Handshake. An error is reported at the first wrong byte.
func (h *socks5) Received(n int) error {
	h.n += n
	got := h.buf[:h.n]
	if len(got) == 0 {
		return nil
	}
	switch h.phase {
	case recvMethod:
		return h.method(got)
	case recvLogin:
		if got[0] != authVersion {
			return fmt.Errorf("%w: version %d of the password negotiation", ErrMalformed, got[0])
		}
		if len(got) == 2 {
			if got[1] != 0 {
				return ErrCredentials
			}
			h.request()
		}
	case recvHead:
		return h.head(got)
	case recvTail:
		if len(got) == len(h.buf) {
			h.tail(got)
		}
	}
	return nil
}

// Done implements Handshake.
func (h *socks5) Done() bool { return h.phase == granted }

// Bound implements Handshake. It returns BND.ADDR and BND.PORT.
func (h *socks5) Bound() Addr { return h.bound }

// Requesting implements Handshake.
func (h *socks5) Requesting() bool { return h.phase == sendRequest }

// Requested implements Handshake.
func (h *socks5) Requested() bool { return h.phase >= recvHead }

// Answered implements Handshake.
func (h *socks5) Answered() bool { return h.phase > recvHead || h.phase == recvHead && h.n > 0 }

// LoggingIn implements Handshake.
func (h *socks5) LoggingIn() bool { return h.phase == sendLogin || h.phase == recvLogin }

// Again implements Handshake.
func (h *socks5) Again() { h.expect(recvHead, headLen) }

// send makes buf the message of phase p.
func (h *socks5) send(p phase, buf []byte) { h.phase, h.buf, h.n = p, buf, 0 }

// expect makes room for the n bytes of phase p.
func (h *socks5) expect(p phase, n int) {
	if cap(h.buf) < n {
		h.buf = make([]byte, n)
	}
	h.phase, h.buf, h.n = p, h.buf[:n], 0
}

func (h *socks5) method(got []byte) error {
	if got[0] != version {
		return fmt.Errorf("%w: SOCKS version %d", ErrMalformed, got[0])
	}
	if len(got) < 2 {
		return nil
	}
	switch m := got[1]; {
	case m == methodNone && h.whole && h.login != nil:
		return fmt.Errorf("%w: method %d was not offered", ErrMalformed, m)
	case m == methodNone:
		h.request()
	case m == methodUser && h.login != nil && h.whole:
		h.expect(recvLogin, 2)
	case m == methodUser && h.login != nil:
		h.send(sendLogin, h.appendLogin(h.buf[:0]))
	case m == methodFail && h.login == nil:
		return fmt.Errorf("%w: it may want a user and a password", ErrMethod)
	case m == methodUser: // mihomo chooses it although it was not offered
		return fmt.Errorf("%w: it wants a user and a password", ErrMethod)
	case m == methodFail:
		return ErrMethod
	default:
		return fmt.Errorf("%w: method %d was not offered", ErrMalformed, m)
	}
	return nil
}

// appendLogin appends the message of RFC 1929 to b.
func (h *socks5) appendLogin(b []byte) []byte {
	b = append(b, authVersion, byte(len(h.login.user)))
	b = append(b, h.login.user...)
	b = append(b, byte(len(h.login.pass)))
	return append(b, h.login.pass...)
}

// request continues with the request, or with its answer if the request was already sent.
func (h *socks5) request() {
	if h.whole {
		h.expect(recvHead, headLen)
		return
	}
	h.send(sendRequest, h.appendRequest(h.buf[:0]))
}

func (h *socks5) appendRequest(b []byte) []byte {
	return appendAddr(append(b, version, byte(h.cmd), 0), h.dst)
}

// head checks the part of the reply that has arrived and, once the length is known, asks for the rest. The rest of a
// refusal is neither awaited nor checked: servers are careless with it, and some close the connection right after the
// code.
func (h *socks5) head(got []byte) error {
	if got[0] != version {
		return fmt.Errorf("%w: SOCKS version %d", ErrMalformed, got[0])
	}
	if len(got) > 1 && got[1] != 0 {
		return Reply(got[1])
	}
	if len(got) > 3 && got[3] != atypIPv4 && got[3] != atypName && got[3] != atypIPv6 {
		return fmt.Errorf("%w: address type %d", ErrMalformed, got[3])
	}
	if len(got) < headLen {
		return nil
	}
	n := 4 + 4 + 2
	switch got[3] {
	case atypIPv6:
		n = 4 + 16 + 2
	case atypName:
		if got[4] == 0 {
			return fmt.Errorf("%w: an empty name", ErrMalformed)
		}
		n = 4 + 1 + int(got[4]) + 2
	}
	if cap(h.buf) < n {
		h.buf = append(make([]byte, 0, n), got...)
	}
	h.phase, h.buf = recvTail, h.buf[:n]
	return nil
}

func (h *socks5) tail(b []byte) {
	port := uint16(b[len(b)-2])<<8 | uint16(b[len(b)-1])
	switch b[3] {
	case atypIPv4:
		h.bound = Addr{IP: netip.AddrFrom4([4]byte(b[4:8])), Port: port}
	case atypIPv6:
		h.bound = Addr{IP: netip.AddrFrom16([16]byte(b[4:20])).Unmap(), Port: port}
	case atypName:
		h.bound = Addr{Name: string(b[5 : len(b)-2]), Port: port}
	}
	h.phase = granted
}
