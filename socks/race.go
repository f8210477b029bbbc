package socks

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stagger is how long an address has before the next one is tried beside it: the Connection Attempt Delay of RFC 8305, section 5.
const stagger = 250 * time.Millisecond

// leg is one of the connections of a dial that race: RFC 8305, "happy eyeballs". The first that is connected goes on, the others
// are closed.
type leg struct {
	p  *dial
	fd int
	at int // in p.addrs
}

// race starts the first leg.
func (p *dial) race() { p.startLeg() }

// startLeg tries the next address beside those that are being tried.
func (p *dial) startLeg() {
	for p.at < len(p.addrs) {
		l := &leg{p: p, at: p.at}
		p.at++
		var err error
		var ours bool
		if l.fd, err, ours = p.socket(p.addrs[l.at]); err == nil {
			err, ours = p.d.register(l.fd, l, unix.EPOLLOUT), true
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
		p.d.timers.set(p, min(p.connectBy, p.d.now()+stagger))
	default:
		p.d.timers.set(p, p.connectBy)
	}
}

// ready implements handler: the leg has arrived, or failed.
func (l *leg) ready(events uint32) {
	p := l.p
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		if e, err := unix.GetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
			p.d.shut(l.fd)
			p.legs = slices.DeleteFunc(p.legs, func(x *leg) bool { return x == l })
			p.lastErr = syscall.Errno(e)
			p.startLeg()
			return
		}
	}
	if events&unix.EPOLLOUT == 0 {
		return
	}
	p.legs = slices.DeleteFunc(p.legs, func(x *leg) bool { return x == l })
	p.dropLegs()
	p.fd, p.at, p.events = l.fd, l.at, unix.EPOLLOUT
	if err := p.d.watch(p.fd, p, p.events); err != nil {
		p.finish(fmt.Errorf("cannot watch a socket: %w", err))
		return
	}
	p.arrived()
}

// dropLegs closes those that have not arrived.
func (p *dial) dropLegs() {
	for _, l := range p.legs {
		p.d.shut(l.fd)
	}
	p.legs = nil
}

// byTurns orders addresses so that the families take turns, beginning with that of the first.
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

// connectVia has another group make the connection to the server. The server's name travels there.
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
	p.c.via.Connect(ctx, dst, func(fd int, err error) {
		if !p.d.post(func() { p.viaDone(fd, err) }) && fd >= 0 {
			_ = unix.Close(fd)
		}
	})
}

// viaDone takes the connection, on the loop.
func (p *dial) viaDone(fd int, err error) {
	switch {
	case p.state == over:
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	case err != nil:
		p.fault(OpConnect, err)
	default:
		p.fd, p.events = fd, unix.EPOLLOUT
		if err := p.d.register(fd, p, p.events); err != nil {
			p.d.release(fd)
			_ = unix.Close(fd)
			p.fd = -1
			p.finish(fmt.Errorf("cannot watch a socket: %w", err))
			return
		}
		p.arrived()
	}
}

// Check looks whether the server works: it is reached, and takes the greeting and the credentials
// where its protocol has them before the request. No request is sent. It returns at
// once. done is called exactly once, on the event loop or on another goroutine, with nil or an error as Connect gives it.
func (c *Client) Check(ctx context.Context, done func(error)) { c.check(ctx, false, done) }

// check: soon gives up early, as while nothing works a server's return must not be missed.
func (c *Client) check(ctx context.Context, soon bool, done func(error)) {
	nobody := Addr{Name: "localhost", Port: 1} // not sent
	c.d.start(&dial{d: c.d, c: c, ctx: ctx, cmd: CmdConnect, dst: nobody, probing: true, soon: soon,
		done: func(_ int, err error) { done(err) }})
}

// checked ends a check that went well.
func (p *dial) checked() {
	p.drop()
	p.leave()
	p.done(-1, nil)
}

// Renew has the server's name looked up anew by the next dial: the network may be another one. The last good answer stays, for when
// the resolver does not answer. What is pending goes on.
func (c *Client) Renew() {
	c.d.post(func() { c.names.stale, c.names.asked = true, -lookAgain })
}

// fail ends the association by an error, from any goroutine; the receiver is told as if the control connection had ended.
func (a *Association) fail(err error) { a.d.post(func() { a.end(err) }) }

// onGone sets what is called once when the association is over, for its group: at once if it is already. It is OnOver for another
// caller.
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
