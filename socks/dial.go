package socks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/loop"
)

const (
	// directTimeout is longer than the kernel's own limit for connect (127 s with tcp_syn_retries 6), which therefore
	// comes first.
	directTimeout = 3 * time.Minute
	// lateReply is the time after which a general failure means that the target is silent: sing-box and tailscale
	// give up after 5 s. A target that answers at all does so within 3 s, in which a SYN is sent three times.
	lateReply = 3 * time.Second
)

// dial is a pending dial. After its start it belongs to its loop.
//
//	resolving ──> connecting ──> securing ──> shaking ──> over
//	    ^             │  next address, or all failed and the name is looked up again
//	    └─────────────┘
//
// The state securing exists only with TLS. A direct dial goes from connecting to over. An error, the deadline or the
// end of the context leads from every state to over.
type dial struct {
	loop.Node
	d         *Dialer
	l         *loop.Loop
	c         *Client // nil: direct
	ctx       context.Context
	attached  loop.Attached // to ctx, if that is a *loop.Call
	stop      func() bool   // ends the watch of any other kind of ctx
	cmd       Command
	dst       Addr
	done      func(loop.Socket, error)
	assocDone func(*Association, error)
	granting  func(*dial) // BIND and RESOLVE: called instead of done
	failed    func(error)

	state     state
	fd        int
	addrs     []netip.AddrPort
	at        int // index of the address being tried
	began     time.Duration
	connectBy time.Duration
	shakeBy   time.Duration
	looked    bool               // the name was looked up for this dial
	lastErr   error              // of the address tried before
	legs      []*leg             // connections that race while there are several addresses
	endVia    context.CancelFunc // ends the connection through another group
	probing   bool               // no request is sent: see Client.Check
	shelf     *shelf             // the pool that the connection is for, or nil
	gen       int                // generation of shelf when the dial began
	pooled    bool               // the connection comes from a pool
	proving   bool               // see provePipelining
	piped     bool               // greeting, login and request are sent in one write
	fast      bool               // TCP Fast Open: only the first byte shows that the server is reached
	soon      bool               // a check that gives up early
	hs        Handshake          // nil: direct
	hs5       socks5             // the Handshake in hs, for SOCKS5
	asked     time.Duration      // when the whole request was sent; 0: not yet
	pump      *pump              // TLS, or nil
	flipped   bool               // ASSOCIATE was refused for one family; the other one is being asked for
	sa        sockaddrRoom
}

// Event bits of a dial.
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

// start lets the dial begin on its loop.
func (d *Dialer) start(p *dial) {
	p.fd = -1
	p.Init(p)
	d.pending.Add(1)
	if d.closed.Load() || !p.l.Join(&p.Node) {
		go p.finish(ErrClosed) // the caller may hold locks that done takes
		return
	}
	p.l.Note(&p.Node, started)
}

// Turn implements loop.Task.
func (p *dial) Turn() (again bool) {
	got := p.Got
	p.Got &^= started | canceled | lookedUp | loop.Tick
	switch {
	case p.state == over: // an event that came late
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

// begin is the first step on the loop.
func (p *dial) begin() {
	if p.c != nil {
		if err := p.check(); err != nil {
			p.finish(err)
			return
		}
	}
	p.began = p.l.Now()
	p.connectBy = p.began + p.connectTime()
	p.l.SetTimer(&p.Node, p.connectBy)
	if call, ok := p.ctx.(*loop.Call); ok {
		p.attached = loop.Attached{Loop: p.l, Node: &p.Node, Bit: canceled}
		call.Attach(&p.attached)
	} else if p.ctx.Done() != nil {
		p.stop = context.AfterFunc(p.ctx, func() { p.l.Note(&p.Node, canceled) })
	}
	if p.c == nil || !p.fromPool() {
		p.seek()
	}
}

// seek finds the address to connect to.
func (p *dial) seek() {
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
	case p.c.via != nil: // the other group makes the connection
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
	p.doubt(err)
	if p.c != nil {
		p.c.count.refused(err)
	}
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

// refused converts err, which ended the dial of an association. A server's answer about the name that stands for UDP
// over TCP says nothing about a target.
func (p *dial) refused(err error) error {
	var r Reply
	var fault *ServerError
	if p.c.server.options.uot && !errors.As(err, &fault) && (errors.As(err, &r) || errors.Is(err, ErrEnded)) {
		return uotRefused(err)
	}
	return err
}

// leave removes the dial from the counts and the timers.
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
		_ = loop.Close(p.fd)
		p.fd = -1
		p.Got &^= loop.In | loop.Out | loop.Hup | loop.Err
	}
	p.dropLegs()
}

// fault ends the dial with a fault of the server.
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

// expired handles the timer: it sets it again or ends the dial.
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
	case p.fast: // SOCKS5 answers before the request
		p.c.failed()
		p.fault(OpConnect, os.ErrDeadlineExceeded)
	case p.state == securing:
		p.fault(OpSecure, os.ErrDeadlineExceeded)
	case p.cmd == CmdConnect && p.hs.Requested() && !p.hs.Answered():
		p.finish(ErrSilent)
	default:
		// An association has no target that could be silent, and the target is not to blame for a reply that never
		// ends.
		p.broken(os.ErrDeadlineExceeded)
	}
}

// granted hands the socket over to the caller.
func (p *dial) granted() {
	if p.c != nil {
		p.c.count.Succeeded.Add(1)
		count.Observe(&p.c.count.Handshake, p.l.Now()-p.began)
	}
	if p.pooled {
		_ = loop.SetOption(p.fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 0) // see shelf.put
	}
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

// sameAddrs reports whether two lists contain the same endpoints, in any order.
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
