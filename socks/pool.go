package socks

import (
	"context"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

const (
	// fillStep is how many connections one use of a pool begins at most. A pool so grows within a few uses, and a server does
	// not get a burst of connections because one flow came.
	fillStep = 2
	// fillAgain is how long a pool is not filled after a connection for it has failed.
	fillAgain = time.Second
)

// shelf is the pool of one Client on one loop: connections that have finished greeting and login and wait for a request. It is
// filled while it is used. All of it belongs to the loop's goroutine. While it holds something it is a member of the loop.
type shelf struct {
	loop.Node // has the timer of age and idle limit
	c         *Client
	l         *loop.Loop
	ready     []*pooled // the oldest first
	filling   int       // dials under way
	used      time.Duration
	retryAt   time.Duration
	gen       int // counts how often it was emptied: what was dialed before is not wanted
	timed     bool
}

// pooled is a connection that waits. Nothing may come from the server: whatever comes ends it.
type pooled struct {
	loop.Node
	s     *shelf
	fd    int // -1: it is over
	since time.Duration
}

// unfit are the events that a connection which waits must not have.
const unfit = loop.In | loop.Hup | loop.Err

// shelfOn is c's pool on l. It is called on the goroutine of l.
func (c *Client) shelfOn(l *loop.Loop) *shelf {
	if s, ok := c.shelves.Load(l); ok {
		return s.(*shelf)
	}
	s := &shelf{c: c, l: l}
	s.Init(s)
	c.shelves.Store(l, s)
	return s
}

// emptyPools closes what waits in the pools of c, soon, on their loops.
func (c *Client) emptyPools() {
	c.shelves.Range(func(_, v any) bool {
		s := v.(*shelf)
		s.l.Post(s.empty)
		return true
	})
}

// closePools has the pools of c emptied and not filled any more.
func (c *Client) closePools() {
	c.noPool.Store(true)
	c.emptyPools()
}

// fromPool gives p a connection that waits, and sends the request on it. false: there is none. Either way this counts as a use,
// and the pool is filled behind it.
func (p *dial) fromPool() bool {
	t := p.d.tuning.Load()
	// With isolation the login depends on the flow. UDP over TCP is a CONNECT too, and takes none.
	if t.Pool == 0 || p.cmd != CmdConnect || p.assocDone != nil || p.probing || p.proving ||
		p.c.server.options.isolate != isolateNone || p.c.noPool.Load() {
		return false
	}
	s := p.c.shelfOn(p.l)
	s.used = p.l.Now()
	waiting := s.take(t)
	s.fill(t, fillStep)
	if waiting == nil {
		return false
	}
	p.fd, p.pooled = waiting.fd, true
	p.l.Adopt(&p.Node, p.l.HandOver(&waiting.Node, waiting.fd))
	waiting.fd = -1
	p.Got &^= loop.In // nothing came yet
	p.state = shaking
	p.shakeBy = p.l.Now() + p.c.handshakeTime()
	p.l.SetTimer(&p.Node, p.shakeBy)
	if err := p.newHandshake(); err != nil {
		p.finish(err)
		return true
	}
	if p.c.server.proto == protoSOCKS5 { // the other protocols begin with the request
		p.hs5.request()
	}
	p.shake()
	return true
}

// replaced begins p anew on a fresh connection when the one from the pool turns out to be dead. It happens once for a flow: a
// server that answers a refused target by FIN, as OpenSSH does, decides by its second FIN.
func (p *dial) replaced() bool {
	if !p.pooled || p.hs.Answered() {
		return false
	}
	p.pooled, p.asked = false, 0
	p.drop()
	p.connectBy = p.l.Now() + p.connectTime()
	p.l.SetTimer(&p.Node, p.connectBy)
	p.seek()
	return true
}

// take gives the youngest connection that is fit, which the caller hands over; nil: there is none.
func (s *shelf) take(t *Tuning) *pooled {
	now := s.l.Now()
	for n := len(s.ready); n > 0; n = len(s.ready) {
		c := s.ready[n-1]
		if c.Got&unfit == 0 && now-c.since < t.PoolAge {
			s.forget(n - 1)
			return c
		}
		s.close(n - 1)
	}
	return nil
}

// forget takes connection i out of the books.
func (s *shelf) forget(i int) {
	s.ready = slices.Delete(s.ready, i, i+1)
	s.c.d.pooled.Add(-1)
	if len(s.ready) == 0 {
		s.l.StopTimer(&s.Node)
		s.timed = false
		s.l.Leave(&s.Node)
	}
}

// close closes connection i.
func (s *shelf) close(i int) {
	c := s.ready[i]
	s.forget(i)
	s.l.Forget(&c.Node)
	_ = unix.Close(c.fd)
	c.fd = -1
}

// empty closes all that waits, and what is under way when it arrives.
func (s *shelf) empty() {
	s.gen++
	for len(s.ready) > 0 {
		s.close(len(s.ready) - 1)
	}
}

// fill begins up to atMost connections, if some are missing.
func (s *shelf) fill(t *Tuning, atMost int) {
	for ; atMost > 0 && len(s.ready)+s.filling < t.Pool && s.l.Now() >= s.retryAt; atMost-- {
		s.filling++
		// A failure is no fault of the server that counts: the next flow finds out. It may be told on another goroutine.
		failed := func(error) {
			s.l.Post(func() {
				s.filling--
				s.retryAt = s.l.Now() + fillAgain
			})
		}
		s.c.d.start(&dial{d: s.c.d, l: s.l, c: s.c, ctx: context.Background(), cmd: CmdConnect, dst: nobody, probing: true,
			shelf: s, gen: s.gen, failed: failed})
	}
}

// put takes the connection of p, a dial that fill has begun.
func (s *shelf) put(p *dial) {
	sock := p.l.HandOver(&p.Node, p.fd)
	p.fd = -1
	p.leave()
	s.filling--
	t, now := s.c.d.tuning.Load(), s.l.Now()
	if p.gen != s.gen || len(s.ready) >= t.Pool || s.c.noPool.Load() || now-s.used >= t.PoolIdle ||
		len(s.ready) == 0 && !s.l.Join(&s.Node) {
		sock.Close()
		return
	}
	c := &pooled{s: s, fd: sock.FD(), since: now}
	c.Init(c)
	s.l.Adopt(&c.Node, sock)
	c.Got &^= loop.In | loop.Out
	s.ready = append(s.ready, c)
	s.c.d.pooled.Add(1)
	// A path that has forgotten the connection swallows the request: then it fails soon, and a fresh one is made.
	_ = unix.SetsockoptInt(c.fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(soonAck.Milliseconds()))
	// What came along with the last answer causes no event any more.
	_, _, err := unix.Recvfrom(c.fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err != unix.EAGAIN || c.Got&unfit != 0 {
		s.close(len(s.ready) - 1)
		return
	}
	s.plan(t)
	s.fill(t, 1)
}

// plan sets the timer for the age of the oldest connection, or the idle limit if that is sooner.
func (s *shelf) plan(t *Tuning) {
	if !s.timed && len(s.ready) > 0 {
		s.timed = true
		s.l.SetTimer(&s.Node, min(s.ready[0].since+t.PoolAge, s.used+t.PoolIdle))
	}
}

// Turn implements loop.Task: the timer. What is too old is replaced while the pool is in use.
func (s *shelf) Turn() (again bool) {
	if s.Got&loop.Tick == 0 {
		return false
	}
	s.Got &^= loop.Tick
	s.timed = false
	t, now := s.c.d.tuning.Load(), s.l.Now()
	if t.Pool == 0 || now-s.used >= t.PoolIdle {
		s.empty()
		return false
	}
	for len(s.ready) > 0 && (now-s.ready[0].since >= t.PoolAge || len(s.ready) > t.Pool) {
		s.close(0)
	}
	s.plan(t)
	s.fill(t, fillStep)
	return false
}

// Shutdown implements loop.Task.
func (s *shelf) Shutdown() { s.empty() }

// Turn implements loop.Task: the server has closed the connection, or speaks out of turn. The next use of the pool replaces it:
// a server that closes what is idle is not asked for ever.
func (c *pooled) Turn() (again bool) {
	if c.fd < 0 || c.Got&unfit == 0 {
		return false
	}
	if i := slices.Index(c.s.ready, c); i >= 0 {
		c.s.close(i)
	}
	return false
}

// Shutdown implements loop.Task. A connection is no member: its shelf is.
func (c *pooled) Shutdown() {}
