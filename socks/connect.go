package socks

import (
	"fmt"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// connect tries the addresses from p.at on: a single one directly, several in a race.
func (p *dial) connect() {
	p.state = connecting
	if len(p.addrs)-p.at > 1 {
		p.race()
		return
	}
	if p.at < len(p.addrs) {
		err, ours := p.open(p.addrs[p.at])
		if err == errBusy {
			p.drop()
			p.l.SetTimer(&p.Node, min(p.connectBy, p.l.Now()+busyWait))
			return
		}
		if err == nil {
			p.l.SetTimer(&p.Node, p.connectBy)
			return
		}
		p.drop()
		if ours {
			p.finish(fmt.Errorf("cannot make a socket: %w", err))
			return
		}
		p.lastErr = err
	}
	p.notReached()
}

// notReached ends an attempt that has no address left.
func (p *dial) notReached() {
	if p.c != nil && p.c.fixed == nil {
		p.c.failed()
		if !p.looked {
			p.c.lookUp(p)
			return
		}
	}
	p.fault(OpConnect, p.lastErr)
}

// allPorts is a value of IP_LOCAL_PORT_RANGE that leaves the host's range unchanged. A socket with this option gets
// any port of that range. Without it, Linux tries all even ports before the first odd one: once 14,000 connections to
// one server have taken the even ports, each connect(2) walks them all (523 µs instead of 21).
const allPorts = 1 | 65535<<16

// open starts connecting to at. ours is true if the error is this host's, so that no other address would help.
func (p *dial) open(at netip.AddrPort) (err error, ours bool) {
	if p.c != nil && p.c.server.path != "" {
		return p.openUnix()
	}
	fd, err, ours := p.socket(at, p.opensFast())
	p.fd = fd
	if err != nil {
		return err, ours
	}
	return p.l.Watch(&p.Node, fd, loop.Stream), true
}

// opensFast reports whether TCP Fast Open is tried. It is used for SOCKS5 without TLS, whose first answer does not
// depend on the target, and not for checks that only test whether the server is there.
func (p *dial) opensFast() bool {
	return p.c != nil && p.c.tls == nil && p.c.server.proto == protoSOCKS5 && !p.probing && p.d.tuning.Load().FastOpen
}

// socket makes a socket and starts connecting it to at. It may return both a socket and an error. With fast, the
// kernel treats the socket as connected and sends the SYN together with the first write (TCP_FASTOPEN_CONNECT,
// tcp(7)).
func (p *dial) socket(at netip.AddrPort, fast bool) (fd int, err error, ours bool) {
	if err := p.sa.set(at); err != nil {
		return -1, err, false
	}
	fd, err = unix.Socket(p.sa.domain(), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err, err != unix.EAFNOSUPPORT
	}
	prepare := p.d.opts.PrepareSocket
	if p.c == nil {
		prepare = p.d.opts.PrepareDirect
	}
	if prepare != nil {
		if err := prepare(fd); err != nil {
			return fd, err, true
		}
	}
	if err := loop.SetOption(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fd, err, true
	}
	if p.soon {
		_ = loop.SetOption(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(soonAck.Milliseconds()))
	}
	_ = loop.SetOption(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, allPorts) // unknown to Linux before 6.3
	if p.c != nil && !fast {
		// With every protocol we speak first, so the ACK of the server's SYN-ACK can travel with our greeting, and the ACK of
		// its first answer with our request (TCP_QUICKACK, tcp(7)). If we have nothing to send, the kernel sends the ACK by
		// itself, after 200 ms at most.
		_ = loop.SetOption(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0)
	}
	p.fast = fast && loop.SetOption(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1) == nil
	switch err := p.sa.connect(fd); err {
	case 0, unix.EINPROGRESS, unix.EINTR:
		return fd, nil, false
	case unix.EADDRNOTAVAIL, unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM: // no local port, no memory
		return fd, err, true
	default:
		return fd, err, false
	}
}

// next gives up on this address and tries the next one.
func (p *dial) next(err error) {
	p.drop()
	p.lastErr = err
	p.at++
	p.connect()
}

// reach continues when the connection has been made or has failed.
func (p *dial) reach() {
	if p.Got&loop.Err != 0 {
		if e, err := unix.GetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
			p.next(syscall.Errno(e))
			return
		}
	}
	if p.Got&loop.Out == 0 {
		return
	}
	if p.c == nil {
		p.granted()
		return
	}
	p.arrived()
}

// arrived continues when the server has been reached. Until the request is sent, the server has nothing to wait for.
// A server that does not answer up to then, such as a stopped process whose kernel still accepts connections, gets no
// more time than the connect timeout.
func (p *dial) arrived() {
	now := p.l.Now()
	p.shakeBy = now + p.c.handshakeTime()
	if p.proving {
		p.shakeBy = now + min(p.c.handshakeTime(), proofTime)
	}
	p.l.SetTimer(&p.Node, min(p.shakeBy, now+p.c.connectTime()))
	if p.c.via == nil && !p.fast {
		p.c.reached(p.addrs[p.at])
	}
	if p.c.tls != nil {
		p.state = securing
		if err := p.secure(); err != nil {
			p.finish(err)
		}
		return
	}
	p.begun()
}

// begun starts the handshake on a connection that is there and, if required, secured.
func (p *dial) begun() {
	p.state = shaking
	if err := p.newHandshake(); err != nil {
		p.finish(err)
		return
	}
	if p.piped = p.pipes(); p.piped {
		p.hs5.pipeline()
	}
	p.shake()
}
