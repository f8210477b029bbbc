package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

const (
	// directTimeout is over the kernel's own limit for a connect (tcp_syn_retries 6: 127 s), which comes first.
	directTimeout = 3 * time.Minute
	// lateReply is from when on a general failure means that the target is silent: sing-box and tailscale give up after 5 s. A
	// target that answers at all does so within the 3 s after which a SYN has been sent three times.
	lateReply = 3 * time.Second
)

// dial is a pending dial. Once started it belongs to its loop.
//
//	resolving ──> connecting ──> securing ──> shaking ──> over
//	    ^             │  next address, or all failed and the name is looked up again
//	    └─────────────┘
//
// Only TLS needs securing. A direct dial goes from connecting to over. Every state goes to over by an error, the deadline, or the context.
type dial struct {
	loop.Node
	d         *Dialer
	l         *loop.Loop
	c         *Client // nil: direct
	ctx       context.Context
	attached  loop.Attached // to ctx, if that is a *loop.Call
	stop      func() bool   // ends the watch of another ctx
	cmd       Command
	dst       Addr
	done      func(loop.Socket, error)
	assocDone func(*Association, error)
	granting  func(*dial) // BIND and RESOLVE: in place of done
	failed    func(error)

	state     state
	fd        int
	addrs     []netip.AddrPort
	at        int // the one that is tried
	connectBy time.Duration
	shakeBy   time.Duration
	looked    bool               // the name was looked up for this very dial
	lastErr   error              // of the address tried before
	legs      []*leg             // that race to connect, while there are several addresses
	endVia    context.CancelFunc // of the connection through another group
	probing   bool               // no request is sent: see Client.Check
	soon      bool               // a check that gives up early
	hs        Handshake          // nil: direct
	hs5       socks5             // what hs is for SOCKS5
	asked     time.Duration      // when the whole request was sent; 0: not yet
	pump      *pump              // TLS; nil: there is none
	flipped   bool               // ASSOCIATE was refused for the family of the control connection, and the other one is asked for
	sa        sockaddrRoom
}

// The bits of a dial.
const (
	started  = loop.Own << iota // the first turn
	canceled                    // its context ended
	lookedUp                    // the resolver answered
)

type state uint8

const (
	starting state = iota
	resolving
	connecting
	securing
	shaking
	waiting // for the second reply to BIND
	over
)

var errEOF = fmt.Errorf("it closed the connection: %w", io.ErrUnexpectedEOF)

// start has the dial begin on its loop.
func (d *Dialer) start(p *dial) {
	p.fd = -1
	p.Init(p)
	d.pending.Add(1)
	if d.closed.Load() || !p.l.Join(&p.Node) {
		go p.finish(ErrClosed) // the caller may hold locks that done wants
		return
	}
	p.l.Note(&p.Node, started)
}

// Turn implements loop.Task.
func (p *dial) Turn() (again bool) {
	got := p.Got
	p.Got &^= started | canceled | lookedUp | loop.Tick
	switch {
	case p.state == over: // a note that came late
	case got&canceled != 0 && p.probing && p.ctx.Err() == context.DeadlineExceeded:
		p.connectBy = p.l.Now()
		p.expired()
	case got&canceled != 0 || got&started != 0 && p.ctx.Err() != nil:
		p.finish(p.ctx.Err())
	case got&started != 0:
		p.begin()
	case got&lookedUp != 0 && p.state == resolving:
		p.resolved()
	case got&loop.Tick != 0:
		p.expired()
	case p.state == connecting && p.fd >= 0:
		p.reach()
	case p.state == shaking || p.state == waiting:
		p.shake()
	}
	return false
}

// Shutdown implements loop.Task.
func (p *dial) Shutdown() { p.finish(ErrClosed) }

// begin is the first thing on the loop.
func (p *dial) begin() {
	if p.c != nil {
		if err := p.check(); err != nil {
			p.finish(err)
			return
		}
	}
	p.connectBy = p.l.Now() + p.connectTime()
	p.l.SetTimer(&p.Node, p.connectBy)
	if call, ok := p.ctx.(*loop.Call); ok {
		p.attached = loop.Attached{Loop: p.l, Node: &p.Node, Bit: canceled}
		call.Attach(&p.attached)
	} else if p.ctx.Done() != nil {
		p.stop = context.AfterFunc(p.ctx, func() { p.l.Note(&p.Node, canceled) })
	}
	switch {
	case p.c == nil:
		p.addrs = []netip.AddrPort{p.dst.AddrPort()}
	case p.c.via != nil:
		p.connectVia()
		return
	case p.c.fixed != nil:
		p.addrs = p.c.fixed
	default:
		p.c.lookUp(p)
		return
	}
	p.connect()
}

func (p *dial) connectTime() time.Duration {
	switch {
	case p.c == nil:
		return directTimeout
	case p.c.via != nil: // which has a handshake of its own
		return p.c.connectTime() + p.c.handshakeTime()
	case p.soon:
		return min(p.c.connectTime(), soonConnect)
	}
	return p.c.connectTime()
}

// finish ends the dial with an error, once.
func (p *dial) finish(err error) {
	if p.state == over {
		return
	}
	p.drop()
	p.leave()
	if p.failed != nil {
		p.failed(err)
		return
	}
	if p.assocDone != nil {
		p.assocDone(nil, p.refused(err))
		return
	}
	p.done(loop.NoSocket, err)
}

// refused is err, which ended an association's dial. Whatever a server answers about the name that stands for UDP over TCP, it
// is no word about a target.
func (p *dial) refused(err error) error {
	var r Reply
	var fault *ServerError
	if p.c.server.options.uot && !errors.As(err, &fault) && (errors.As(err, &r) || errors.Is(err, ErrEnded)) {
		return uotRefused(err)
	}
	return err
}

// leave takes the dial out of the books.
func (p *dial) leave() {
	p.state = over
	p.l.StopTimer(&p.Node)
	p.l.Leave(&p.Node)
	p.d.pending.Add(-1)
	if call, ok := p.ctx.(*loop.Call); ok {
		call.Detach(&p.attached)
	} else if p.stop != nil {
		p.stop()
	}
	if p.endVia != nil {
		p.endVia()
	}
}

// drop closes the socket of this attempt.
func (p *dial) drop() {
	if p.pump != nil {
		p.pump.cancel()
		p.pump = nil
	}
	if p.fd >= 0 {
		p.l.Forget(&p.Node)
		unix.Close(p.fd)
		p.fd = -1
		p.Got &^= loop.In | loop.Out | loop.Hup | loop.Err
	}
	p.dropLegs()
}

// fault ends the dial by the server's fault.
func (p *dial) fault(op string, err error) {
	if p.c == nil {
		if errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, os.ErrDeadlineExceeded) {
			err = ErrSilent
		}
		p.finish(fmt.Errorf("cannot connect to %v: %w", p.dst, err))
		return
	}
	p.finish(&ServerError{Server: p.c.server.String(), Op: op, Err: err})
}

// connect tries the addresses from p.at on: one by itself, several by a race.
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

// notReached: no address is left to try.
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

// allPorts is an IP_LOCAL_PORT_RANGE that leaves the host's range as it is. A socket that has the option is given any port of
// that range. Without it Linux tries all even ports before the first odd one: when 14,000 connections to one server have
// taken the even ones, each connect(2) walks them all (523 µs against 21).
const allPorts = 1 | 65535<<16

// open starts connecting to at. ours: the error is this host's and no other address would help.
func (p *dial) open(at netip.AddrPort) (err error, ours bool) {
	if p.c != nil && p.c.server.path != "" {
		return p.openUnix()
	}
	fd, err, ours := p.socket(at)
	p.fd = fd
	if err != nil {
		return err, ours
	}
	return p.l.Watch(&p.Node, fd, loop.Stream), true
}

// socket makes a socket and starts connecting it to at. It may give one and an error, too.
func (p *dial) socket(at netip.AddrPort) (fd int, err error, ours bool) {
	if err := p.sa.set(at); err != nil {
		return -1, err, false
	}
	fd, err = unix.Socket(p.sa.domain(), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err, err != unix.EAFNOSUPPORT
	}
	control := p.d.opts.Control
	if p.c == nil {
		control = p.d.opts.DirectControl
	}
	if control != nil {
		if err := control(fd); err != nil {
			return fd, err, true
		}
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fd, err, true
	}
	if p.soon {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(soonAck.Milliseconds()))
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, allPorts) // Linux before 6.3 does not know it
	switch err := p.sa.connect(fd); err {
	case 0, unix.EINPROGRESS, unix.EINTR:
		return fd, nil, false
	case unix.EADDRNOTAVAIL, unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM: // no local port, no memory
		return fd, err, true
	default:
		return fd, err, false
	}
}

// next gives up this address.
func (p *dial) next(err error) {
	p.drop()
	p.lastErr = err
	p.at++
	p.connect()
}

// expired moves the timer or ends the dial.
func (p *dial) expired() {
	switch {
	case p.state == resolving:
		p.fault(OpResolve, os.ErrDeadlineExceeded)
	case p.state == connecting && p.l.Now() < p.connectBy && p.fd < 0 && len(p.legs) == 0: // the wait after errBusy is over
		p.connect()
	case p.state == connecting && p.l.Now() < p.connectBy:
		p.startLeg()
	case p.state == connecting:
		if p.c != nil && p.c.fixed == nil {
			p.c.failed()
		}
		p.fault(OpConnect, os.ErrDeadlineExceeded)
	case p.state == waiting:
		p.finish(ErrNoPeer)
	case p.state == securing:
		p.fault(OpSecure, os.ErrDeadlineExceeded)
	case p.cmd == CmdConnect && p.hs.Requested() && !p.hs.Answered():
		p.finish(ErrSilent)
	default:
		// An association has no target that could be silent; a reply that never ends is not the target's either.
		p.broken(os.ErrDeadlineExceeded)
	}
}

// reach goes on when the server was reached.
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

// arrived: the server is reached. Until the request is sent there is nothing that a server could wait for: one that does not
// answer so far, as a stopped process whose kernel takes connections, has no more time than to be reached.
func (p *dial) arrived() {
	now := p.l.Now()
	p.shakeBy = now + p.c.handshakeTime()
	p.l.SetTimer(&p.Node, min(p.shakeBy, now+p.c.connectTime()))
	if p.c.via == nil {
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

// begun begins the handshake: the connection is there, and secured if it is to be.
func (p *dial) begun() {
	p.state = shaking
	if err := p.newHandshake(); err != nil {
		p.finish(err)
		return
	}
	p.shake()
}

// shake does what the handshake needs and the socket allows.
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
				p.broken(err)
				return
			}
			p.hs.Sent(n)
			if p.asked == 0 && p.hs.Requested() {
				p.asked = p.l.Now()
				p.l.SetTimer(&p.Node, p.shakeBy)
			}
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
			if p.hs.Requested() && !p.hs.Answered() {
				p.finish(ErrEnded)
				return
			}
			err = errEOF
		}
		if err != nil {
			p.broken(err)
			return
		}
		if n < len(in) && p.Got&loop.Hup == 0 {
			p.Got &^= loop.In // that was all: what comes later is a new event
		}
		if err := p.hs.Received(n); err != nil {
			p.answered(err)
			return
		}
	}
	p.granted()
}

// answered ends the dial by an answer that is no grant.
func (p *dial) answered(err error) {
	var r Reply
	switch {
	case errors.As(err, &r) && r == ReplyAddrTypeNotSupported && p.cmd == CmdAssociate && !p.flipped:
		// A dante without IPv6 refuses ::, though it could relay. The next request needs a connection of its own.
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

// broken ends the dial when the server closed the connection or hung in the handshake.
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

// check finds what the protocol cannot express before a connection is made for it.
func (p *dial) check() error {
	if p.cmd == CmdAssociate && p.c.server.tls {
		// Its datagrams would travel in clear.
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

// zeros is what ASSOCIATE asks with: no endpoint of the family of the control connection, since a server may take it for the
// family of the relay that is wanted.
func (p *dial) zeros() Addr {
	v6 := p.at < len(p.addrs) && p.addrs[p.at].Addr().Is6()
	if v6 != p.flipped {
		return Addr{IP: netip.IPv6Unspecified()}
	}
	return Addr{IP: netip.IPv4Unspecified()}
}

// granted hands the socket over.
func (p *dial) granted() {
	if p.granting != nil {
		p.granting(p)
		return
	}
	s := p.l.HandOver(&p.Node, p.fd)
	p.fd = -1
	p.leave()
	if p.assocDone != nil {
		p.associated(s)
		return
	}
	p.done(s, nil)
}

// The sockets are non-blocking, so neither call waits, and the Go scheduler need not be told of it.

func read(fd int, b []byte) (int, error) { return rawIO(unix.SYS_READ, fd, b) }

// write relies on the Go runtime, which ignores SIGPIPE for all but standard output and error.
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

// sameAddrs reports whether two lists name the same endpoints, in whatever order.
func sameAddrs(a, b []netip.AddrPort) bool {
	if len(a) != len(b) {
		return false
	}
	for _, x := range a {
		if !slices.Contains(b, x) {
			return false
		}
	}
	return true
}
