package socks

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// stagger is the time after which the next address is tried in parallel: the Connection Attempt Delay of RFC 8305,
// section 5.
const stagger = 250 * time.Millisecond

// leg is one of the racing connections of a dial (RFC 8305, "Happy Eyeballs"). The dial continues with the first leg
// that is connected; the others are closed.
type leg struct {
	loop.Node
	p  *dial
	fd int
	at int // in p.addrs
}

// race starts the first leg.
func (p *dial) race() { p.startLeg() }

// startLeg tries the next address in parallel with those in progress.
func (p *dial) startLeg() {
	for p.at < len(p.addrs) {
		l := &leg{p: p, at: p.at}
		l.Init(l)
		p.at++
		var err error
		var ours bool
		if l.fd, err, ours = p.socket(p.addrs[l.at], false); err == nil {
			err, ours = p.l.Watch(&l.Node, l.fd, loop.Stream), true
		}
		if err == nil {
			p.legs = append(p.legs, l)
			break
		}
		if l.fd >= 0 {
			_ = unix.Close(l.fd)
		}
		if ours {
			p.drop()
			p.finish(fmt.Errorf("cannot make a socket: %w", err))
			return
		}
		p.lastErr = err
	}
	switch {
	case len(p.legs) == 0:
		p.notReached()
	case p.at < len(p.addrs):
		p.l.SetTimer(&p.Node, min(p.connectBy, p.l.Now()+stagger))
	default:
		p.l.SetTimer(&p.Node, p.connectBy)
	}
}

// Turn implements loop.Task. The leg is connected or has failed.
func (l *leg) Turn() (again bool) {
	p := l.p
	if l.fd < 0 {
		return false
	}
	if l.Got&loop.Err != 0 {
		if e, err := unix.GetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
			l.close()
			p.legs = slices.DeleteFunc(p.legs, func(x *leg) bool { return x == l })
			p.lastErr = syscall.Errno(e)
			p.startLeg()
			return false
		}
	}
	if l.Got&loop.Out == 0 {
		return false
	}
	p.legs = slices.DeleteFunc(p.legs, func(x *leg) bool { return x == l })
	p.dropLegs()
	p.fd, p.at = l.fd, l.at
	p.l.Adopt(&p.Node, p.l.HandOver(&l.Node, l.fd))
	l.fd = -1
	p.arrived()
	return false
}

// Shutdown implements loop.Task. Not the leg but its dial is a member of the loop.
func (l *leg) Shutdown() {}

func (l *leg) close() {
	l.p.l.Forget(&l.Node)
	_ = unix.Close(l.fd)
	l.fd = -1
}

// dropLegs closes the legs that are not connected.
func (p *dial) dropLegs() {
	for _, l := range p.legs {
		l.close()
	}
	p.legs = nil
}

// byTurns reorders addresses so that the families alternate, beginning with the family of the first address.
func byTurns(addrs []netip.AddrPort) []netip.AddrPort {
	var families [2][]netip.AddrPort
	first := addrs[0].Addr().Is4()
	for _, a := range addrs {
		i := 0
		if a.Addr().Is4() != first {
			i = 1
		}
		families[i] = append(families[i], a)
	}
	out := make([]netip.AddrPort, 0, len(addrs))
	for i := range addrs {
		for _, f := range families {
			if i < len(f) {
				out = append(out, f[i])
			}
		}
	}
	return out
}

// connectVia lets another group make the connection to the server. The server's name is passed on to that group.
func (p *dial) connectVia() {
	p.state = connecting
	ctx, cancel := context.WithCancel(p.ctx)
	p.endVia = cancel
	if p.cmd == CmdAssociate {
		p.finish(fmt.Errorf("no datagrams go through a chain: %w", ReplyCommandNotSupported))
		return
	}
	dst := Addr{Name: p.c.server.host, Port: p.c.server.port}
	if ip, ok := p.c.server.addr(); ok {
		dst = Addr{IP: ip.WithZone(""), Port: p.c.server.port}
	}
	p.c.via.Connect(ctx, p.l, dst, func(s loop.Socket, err error) {
		if err == nil { // on the loop
			p.viaDone(s, nil)
		} else {
			p.l.Post(func() { p.viaDone(loop.NoSocket, err) })
		}
	})
}

// viaDone takes over the connection. It runs on the loop.
func (p *dial) viaDone(s loop.Socket, err error) {
	switch {
	case p.state == over:
		s.Close()
	case err != nil:
		p.fault(OpConnect, err)
	default:
		p.fd = s.FD()
		p.l.Adopt(&p.Node, s)
		p.arrived()
	}
}

// Check tests whether the server works: it can be reached, and it accepts the greeting and, where the protocol sends
// them before the request, the credentials. No request is sent. Check returns at once. done is called exactly once,
// on the event loop or on another goroutine, with nil or an error as from Connect. The deadline of ctx counts as a
// timeout: the error then tells what was waited for.
func (c *Client) Check(ctx context.Context, l *loop.Loop, done func(error)) {
	c.check(ctx, l, false, done)
}

// check is Check. With soon it gives up early: while no server works, the return of this one must be noticed quickly.
func (c *Client) check(ctx context.Context, l *loop.Loop, soon bool, done func(error)) {
	c.d.start(&dial{d: c.d, l: l, c: c, ctx: ctx, cmd: CmdConnect, dst: nobody, probing: true, soon: soon,
		done: func(_ loop.Socket, err error) { done(err) }})
}

// Check tests all servers at the same time, as Client.Check does, whatever their state, and does not change their
// state. done is called exactly once, on the event loop or on another goroutine: with nil as soon as one server
// works, otherwise with the errors of all servers, in their order. Tests that are no longer needed are ended.
func (g *Group) Check(ctx context.Context, l *loop.Loop, done func(errs []error)) {
	k := &groupCheck{errs: make([]error, len(g.clients)), left: len(g.clients), done: done}
	ctx, k.cancel = context.WithCancel(ctx)
	for i, c := range g.clients {
		c.check(ctx, l, false, func(err error) { k.took(i, err) })
	}
}

// groupCheck is a Group.Check in progress.
type groupCheck struct {
	mu     sync.Mutex
	errs   []error // for each server
	left   int     // tests in progress; 0: done was called
	cancel context.CancelFunc
	done   func([]error)
}

func (k *groupCheck) took(i int, err error) {
	k.mu.Lock()
	if k.left == 0 {
		k.mu.Unlock()
		return
	}
	k.left--
	k.errs[i] = err
	all := k.errs
	if err == nil {
		k.left, all = 0, nil
	}
	over := k.left == 0
	k.mu.Unlock()
	if over {
		k.cancel()
		k.done(all)
	}
}

// checked ends a successful check.
func (p *dial) checked() {
	if p.shelf != nil {
		p.shelf.put(p)
		return
	}
	p.drop()
	p.leave()
	p.done(loop.NoSocket, nil)
}

// Renew tells the client that the network may have changed. The next dial looks up the server's name again, and the
// pool is emptied. The last good answer is kept in case the resolver does not answer. Pending dials continue.
func (c *Client) Renew() {
	n := &c.names
	n.mu.Lock()
	n.asked = time.Time{}
	n.mu.Unlock()
	c.failed()
	c.emptyPools()
	c.pipe.takes.Store(false)
	c.pipe.notBefore.Store(0)
}

// fail ends the association with an error. It may be called from any goroutine; the receiver is told as if the
// control connection had ended.
func (a *Association) fail(err error) { a.l.Post(func() { a.end(err) }) }

// onGone sets the function that is called once when the association is over, or at once if it already is. It is
// OnOver for the group.
func (a *Association) onGone(f func()) {
	a.mu.Lock()
	over := a.over
	if !over {
		a.gone = f
	}
	a.mu.Unlock()
	if over {
		f()
	}
}
