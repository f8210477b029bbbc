package socks

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

var errEOF = fmt.Errorf("it closed the connection: %w", io.ErrUnexpectedEOF)

// shake advances the handshake as far as the socket allows.
func (p *dial) shake() {
	for !p.hs.Done() {
		if p.probing && p.hs.Requesting() {
			p.checked()
			return
		}
		if out := p.hs.Output(); len(out) > 0 {
			if p.Got&loop.Out == 0 {
				return
			}
			n, err := write(p.fd, out)
			if err == unix.EAGAIN {
				p.Got &^= loop.Out
				return
			}
			if err != nil {
				p.cut(err)
				return
			}
			p.hs.Sent(n)
			p.noteRequest()
			continue
		}
		if p.Got&loop.In == 0 {
			return
		}
		in := p.hs.Input()
		n, err := read(p.fd, in)
		if err == unix.EAGAIN {
			p.Got &^= loop.In
			return
		}
		if err == nil && n == 0 {
			err = errEOF
		}
		if err != nil {
			p.cut(err)
			return
		}
		if p.fast {
			p.fast = false
			p.c.reached(p.addrs[p.at])
		}
		if n < len(in) && p.Got&loop.Hup == 0 {
			p.Got &^= loop.In // everything is read: bytes that come later cause a new event
		}
		if err := p.hs.Received(n); err != nil {
			p.answered(err)
			return
		}
		p.noteRequest()
	}
	p.granted()
}

// noteRequest notes when the whole request was sent, from when on the server has its time to answer. A request that
// was sent together with the greeting counts once the server has answered the greeting; until then we are waiting for
// the server.
func (p *dial) noteRequest() {
	if p.asked == 0 && p.hs.Requested() {
		p.asked = p.l.Now()
		p.l.SetTimer(&p.Node, p.shakeBy)
	}
}

// cut handles the end of the connection during the handshake. errEOF means FIN.
func (p *dial) cut(err error) {
	switch {
	case p.replaced():
	case p.fast && err != errEOF && err != unix.ECONNRESET && err != unix.EPIPE: // it was never connected
		p.fast = false
		p.next(err)
	case err == errEOF && p.hs.Requested() && !p.hs.Answered():
		p.finish(ErrEnded)
	default:
		p.broken(err)
	}
}

// answered ends the dial with an answer other than success.
func (p *dial) answered(err error) {
	var r Reply
	switch {
	case errors.As(err, &r) && r == ReplyAddrTypeNotSupported && p.cmd == CmdAssociate && !p.flipped:
		// A dante without IPv6 refuses ::, although it could relay. The next request needs its own connection.
		p.flipped, p.asked = true, 0
		p.drop()
		p.connectBy = p.l.Now() + time.Duration(p.d.connectTimeout.Load())
		p.connect()
	case errors.As(err, &r) && r == ReplyGeneralFailure && p.cmd == CmdConnect && p.l.Now()-p.asked > lateReply:
		p.finish(fmt.Errorf("%w: %w", ErrLate, err))
	case errors.As(err, &r):
		p.finish(err)
	case errors.Is(err, ErrMethod) || errors.Is(err, ErrCredentials):
		p.fault(OpAuthenticate, err)
	default:
		p.fault(OpHandshake, err)
	}
}

// broken ends the dial when the server closed the connection or hung during the handshake.
func (p *dial) broken(err error) {
	switch {
	case !p.hs.LoggingIn():
		p.fault(OpHandshake, err)
	case p.c.server.HasPassword() || p.c.server.options.isolate != isolateNone:
		p.fault(OpAuthenticate, err)
	default:
		p.fault(OpAuthenticate, fmt.Errorf("%w: %w", ErrNoPassword, err))
	}
}

// check finds requests that the protocol cannot express before a connection is made for them.
func (p *dial) check() error {
	if p.cmd == CmdAssociate && p.c.server.tls {
		// The datagrams would travel unencrypted.
		return &inexpressible{p.c.server.proto, "UDP inside TLS", ReplyCommandNotSupported}
	}
	if p.cmd != CmdAssociate && p.c.server.proto == protoSOCKS5 {
		return p.dst.check()
	}
	return p.newHandshake()
}

// newHandshake begins the handshake of a connection.
func (p *dial) newHandshake() (err error) {
	if p.cmd == CmdAssociate {
		p.dst = p.zeros()
	}
	p.hs, err = newHandshake(&p.hs5, p.c.server.proto, p.loginFor(), p.cmd, p.dst)
	return err
}

// zeros returns the DST of an ASSOCIATE: an all-zero endpoint of the family of the control connection, because a
// server may take it for the family of the relay that is wanted.
func (p *dial) zeros() Addr {
	v6 := p.at < len(p.addrs) && p.addrs[p.at].Addr().Is6()
	if v6 != p.flipped {
		return Addr{IP: netip.IPv6Unspecified()}
	}
	return Addr{IP: netip.IPv4Unspecified()}
}

// The sockets are non-blocking, so neither call waits, and the Go scheduler need not know of it.

func read(fd int, b []byte) (int, error) { return rawIO(unix.SYS_READ, fd, b) }

// write relies on the Go runtime, which ignores SIGPIPE except for standard output and error.
func write(fd int, b []byte) (int, error) { return rawIO(unix.SYS_WRITE, fd, b) }

func rawIO(call uintptr, fd int, b []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}
