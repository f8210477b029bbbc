package socks

import (
	"context"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

const (
	// fillStep is the maximum number of connections that one use of a pool begins. A pool thus grows within a few
	// uses, and a single flow causes no burst of connections to the server.
	fillStep = 2
	// fillAgain is how long a pool is not filled after a connection for it has failed.
	fillAgain = time.Second
)

// shelf is the pool of one Client on one loop: connections that have finished greeting and login and wait for a
// request. Each use fills it again. All of it belongs to the loop's goroutine. While it holds a connection, it is a
// member of the loop.
type shelf struct {
	loop.Node // has the timer for age and idle limit
	c         *Client
	l         *loop.Loop
	ready     []*pooled // oldest first
	filling   int       // dials in progress
	used      time.Duration
	retryAt   time.Duration
	gen       int // how often the pool was emptied: connections dialed before that are not wanted
	timed     bool
}

// pooled is a connection that waits in a pool. The server must send nothing on it; anything it sends ends the
// connection.
type pooled struct {
	loop.Node
	s     *shelf
	fd    int // -1: it is over
	since time.Duration
}

// unfit is the set of events that a waiting connection must not have.
const unfit = loop.In | loop.Hup | loop.Err

// shelfOn returns c's pool on l. It is called on the goroutine of l.
func (c *Client) shelfOn(l *loop.Loop) *shelf {
	if s, ok := c.shelves.Load(l); ok {
		return s.(*shelf)
	}
	s := &shelf{c: c, l: l}
	s.Init(s)
	c.shelves.Store(l, s)
	return s
}

// emptyPools closes the connections in the pools of c. Each loop does so in its next turn.
func (c *Client) emptyPools() {
	c.shelves.Range(func(_, v any) bool {
		s := v.(*shelf)
		s.l.Post(s.empty)
		return true
	})
}

// closePools empties the pools of c and stops filling them.
func (c *Client) closePools() {
	c.noPool.Store(true)
	c.emptyPools()
}

// fromPool gives p a waiting connection and sends the request on it. It returns false if there is none. Either way
// this counts as a use, and the pool is filled again.
func (p *dial) fromPool() bool {
	t := p.d.tuning.Load()
	// With isolation, the login depends on the flow. UDP over TCP is a CONNECT too, but takes no connection from the
	// pool.
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
	p.Got &^= loop.In // nothing has come yet
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

// replaced starts p again on a fresh connection if the one from the pool turns out to be dead. It does so once for
// each flow: if a server closes connections when the target refuses, as OpenSSH does, its second FIN is the answer.
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

// take returns the youngest connection that is fit, for the caller to hand over, or nil.
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

// forget removes connection i from the pool's records.
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

// empty closes all waiting connections now, and those being made when they arrive.
func (s *shelf) empty() {
	s.gen++
	for len(s.ready) > 0 {
		s.close(len(s.ready) - 1)
	}
}

// fill begins up to atMost connections if the pool is not full.
func (s *shelf) fill(t *Tuning, atMost int) {
	for ; atMost > 0 && len(s.ready)+s.filling < t.Pool && s.l.Now() >= s.retryAt; atMost-- {
		s.filling++
		// A failure does not count as a fault of the server: the next flow will find out. This may run on another
		// goroutine.
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

// put stores the connection of p, a dial that fill has begun.
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
	// A path that has forgotten the connection swallows the request. With this option it fails soon and is made
	// again.
	_ = unix.SetsockoptInt(c.fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(soonAck.Milliseconds()))
	// Bytes that came along with the last answer cause no further event.
	_, _, err := unix.Recvfrom(c.fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err != unix.EAGAIN || c.Got&unfit != 0 {
		s.close(len(s.ready) - 1)
		return
	}
	s.plan(t)
	s.fill(t, 1)
}

// plan sets the timer to the age limit of the oldest connection or to the idle limit, whichever comes first.
func (s *shelf) plan(t *Tuning) {
	if !s.timed && len(s.ready) > 0 {
		s.timed = true
		s.l.SetTimer(&s.Node, min(s.ready[0].since+t.PoolAge, s.used+t.PoolIdle))
	}
}

// Turn implements loop.Task. It handles the timer: connections that are too old are replaced while the pool is in
// use.
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

// Turn implements loop.Task. The server has closed the connection or has sent something unexpected. The connection is
// replaced at the next use of the pool, so that a server that closes idle connections is not called without end.
func (c *pooled) Turn() (again bool) {
	if c.fd < 0 || c.Got&unfit == 0 {
		return false
	}
	if i := slices.Index(c.s.ready, c); i >= 0 {
		c.s.close(i)
	}
	return false
}

// Shutdown implements loop.Task. Not the connection but its shelf is a member of the loop.
func (c *pooled) Shutdown() {}
