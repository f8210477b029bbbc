package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"
)

const (
	minAttempt = time.Second            // for one resolver, when there are others: a proxy may be 300 ms away and more
	downFor    = 30 * time.Second       // a resolver that failed is asked last for so long
	maxAsked   = 32                     // servers that are asked because the app named them, at a time
	tick       = 100 * time.Millisecond // how exact the deadlines are
)

// exchange asks resolvers over TCP through the upstream. take may be called from any goroutine while run runs.
type exchange struct {
	dial      func(ctx context.Context, dst netip.AddrPort, done func(fd int, err error))
	inFlight  int
	idleClose time.Duration
	log       *slog.Logger
	count     *counters // only dropped, unmatched and connections are counted here

	// finish is called once for each query that take took, from run's goroutine, with the answer of a resolver, which belongs
	// to it, or with nil if none answered. When run ends first it is not called.
	finish func(q *query, resp []byte)

	taken atomic.Int32 // queries between take and finish; at most inFlight
	in    chan *query
	dials chan dialed  // one place for each resolver: done never blocks
	msgs  chan message // from connections
	over  chan struct{}

	// Owned by run.
	resolvers []*resolver
	asked     map[netip.AddrPort]*resolver // beside those: servers that the app named; at most maxAsked
	live      map[*query]struct{}
}

type dialed struct {
	r   *resolver
	fd  int
	err error
}

// message is what a connection read: an answer, or its end.
type message struct {
	c   *conn
	msg []byte
	err error
}

// query is a question on its way.
type query struct {
	wire     []byte // length and message, with the ID for the resolver
	q        question
	reply    func([]byte) // for finish
	key      string       // as appendKey has it; empty: the answer is for this asker alone
	deadline time.Time
	to       netip.AddrPort // the server that the app asked, if this must go there

	// Owned by run.
	attempt time.Time // until then this resolver has time
	sent    time.Time
	ways    []*resolver // who may be asked, in this order
	at      *resolver
	tried   uint32 // of ways, a bit each
	retried bool   // sent again because a connection ended that had served
	best    []byte // a SERVFAIL or REFUSED, for want of better
}

func (q *query) msg() []byte { return q.wire[2:] }

type resolver struct {
	addr    netip.AddrPort
	conn    *conn // nil: none is open
	cancel  context.CancelFunc
	waiting []*query          // for the dial
	asked   map[uint16]*query // by the ID that it was given
	used    time.Time         // when something was last sent or came
	heard   time.Time         // when the last answer came
	down    time.Time         // asked last until then
	failing bool              // and this was logged
}

// newExchange takes a Config with all its defaults.
func newExchange(cfg *Config, count *counters, finish func(q *query, resp []byte)) *exchange {
	x := &exchange{
		dial:      cfg.Dial,
		inFlight:  cfg.InFlight,
		idleClose: cfg.IdleClose,
		log:       cfg.Log,
		count:     count,
		finish:    finish,
		in:        make(chan *query, cfg.InFlight),
		dials:     make(chan dialed, len(cfg.Resolvers)+maxAsked),
		msgs:      make(chan message, 16),
		over:      make(chan struct{}),
		asked:     make(map[netip.AddrPort]*resolver),
		live:      make(map[*query]struct{}),
	}
	for _, a := range cfg.Resolvers {
		x.resolvers = append(x.resolvers, newResolver(a))
	}
	return x
}

func newResolver(a netip.AddrPort) *resolver {
	return &resolver{addr: a, asked: make(map[uint16]*query)}
}

// take has q asked, and owns it from here on. It does not block; false: too many questions are on their way, or run is over. The
// question is then counted as dropped, and finish is not called.
func (x *exchange) take(q *query) bool {
	select {
	case <-x.over:
		x.count.dropped.Add(1)
		return false
	default:
	}
	if x.taken.Add(1) > int32(x.inFlight) {
		x.taken.Add(-1)
		x.count.dropped.Add(1)
		return false
	}
	x.in <- q // it has room for all that are taken
	return true
}

// run asks until ctx ends; then it closes the connections and leaves open questions unfinished. It may be called once.
func (x *exchange) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	timer := time.NewTimer(tick)
	defer timer.Stop()
	ticking := true
	for {
		if !ticking && x.busy() {
			timer.Reset(tick)
			ticking = true
		}
		select {
		case <-ctx.Done():
			close(x.over)
			cancel()
			x.teardown()
			return
		case q := <-x.in:
			x.live[q] = struct{}{}
			q.ways = x.ways(q.to)
			x.ask(ctx, q)
		case d := <-x.dials:
			x.dialed(ctx, d)
		case m := <-x.msgs:
			x.received(ctx, m)
		case <-timer.C:
			ticking = false
			x.expire(ctx, time.Now())
		}
	}
}

// busy reports whether the clock is needed.
func (x *exchange) busy() bool {
	if len(x.live) > 0 {
		return true
	}
	for r := range x.all() {
		if r.conn != nil || r.cancel != nil {
			return true
		}
	}
	return false
}

// all yields the resolvers, and the servers that the app named.
func (x *exchange) all() iter.Seq[*resolver] {
	return func(yield func(*resolver) bool) {
		for _, r := range x.resolvers {
			if !yield(r) {
				return
			}
		}
		for _, r := range x.asked {
			if !yield(r) {
				return
			}
		}
	}
}

// ways are who may be asked: the resolvers, or the server to if it is valid. None: too many servers are asked already.
func (x *exchange) ways(to netip.AddrPort) []*resolver {
	if !to.IsValid() {
		return x.resolvers
	}
	for _, r := range x.resolvers {
		if r.addr == to {
			return []*resolver{r}
		}
	}
	r := x.asked[to]
	if r == nil {
		if len(x.asked) >= maxAsked {
			return nil
		}
		r = newResolver(to)
		x.asked[to] = r
	}
	return []*resolver{r}
}

func (x *exchange) teardown() {
	for r := range x.all() {
		if r.conn != nil {
			r.conn.close()
		}
	}
	for r := range x.all() {
		if r.conn != nil {
			r.conn.wait()
		}
		if r.cancel != nil { // the dial was cancelled with ctx, and done comes all the same
			r.cancel()
			d := <-x.dials
			if d.err == nil {
				closeFD(d.fd)
			}
		}
	}
}

// ask gives q to the first resolver that was not tried and is not down, or failing that to one that is, or gives up.
func (x *exchange) ask(ctx context.Context, q *query) {
	now := time.Now()
	var to *resolver
	left, bit := 0, uint32(0)
	for i, r := range q.ways {
		if q.tried&(1<<i) != 0 {
			continue
		}
		left++
		if to == nil || now.Before(to.down) && !now.Before(r.down) {
			to, bit = r, 1<<i
		}
	}
	if to == nil || !now.Before(q.deadline) {
		x.fail(q)
		return
	}
	q.tried |= bit
	q.attempt = q.deadline
	if left > 1 {
		q.attempt = now.Add(max(q.deadline.Sub(now)/time.Duration(left), minAttempt))
	}
	x.send(ctx, to, q)
}

// send puts q on r's connection, or dials one.
func (x *exchange) send(ctx context.Context, r *resolver, q *query) {
	now := time.Now()
	q.at, q.sent = r, now
	if r.conn == nil {
		r.waiting = append(r.waiting, q)
		if r.cancel == nil {
			var dctx context.Context
			dctx, r.cancel = context.WithCancel(ctx)
			x.dial(dctx, r.addr, func(fd int, err error) { x.dials <- dialed{r, fd, err} })
		}
		return
	}
	id := uint16(rand.Uint32()) // ChaCha8, seeded by the system: RFC 5452 9.2
	for r.asked[id] != nil {
		id = uint16(rand.Uint32())
	}
	binary.BigEndian.PutUint16(q.msg(), id)
	r.asked[id] = q
	r.used = now
	if !r.conn.write(q.wire) {
		x.lost(ctx, r, errors.New("it does not take what is sent"))
	}
}

func (x *exchange) dialed(ctx context.Context, d dialed) {
	r := d.r
	r.cancel()
	r.cancel = nil
	waiting := r.waiting
	r.waiting = nil
	if d.err == nil {
		r.conn, d.err = newConn(d.fd, x, r)
	}
	if d.err != nil {
		x.markDown(r, d.err)
	} else {
		x.count.connections.Add(1)
		r.used = time.Now()
		r.heard = time.Time{}
	}
	for _, q := range waiting {
		if _, ok := x.live[q]; !ok || q.at != r {
			continue
		}
		// The connection may be lost again while the queries are put on it.
		if d.err == nil {
			x.send(ctx, r, q)
		} else {
			x.ask(ctx, q)
		}
	}
}

// lost ends r's connection and finds another way for what was asked on it.
func (x *exchange) lost(ctx context.Context, r *resolver, why error) {
	r.conn.close()
	r.conn.wait()
	r.conn = nil
	asked := r.asked
	r.asked = make(map[uint16]*query)
	served := !r.heard.IsZero()
	if len(asked) > 0 && !served {
		x.markDown(r, why)
	}
	for _, q := range asked {
		// RFC 7766 6.2.4: a resolver may close an idle connection just when a question is on its way.
		if served && !q.retried {
			q.retried = true
			x.send(ctx, r, q)
			continue
		}
		x.ask(ctx, q)
	}
}

func (x *exchange) markDown(r *resolver, why error) {
	r.down = time.Now().Add(downFor)
	if !r.failing && !errors.Is(why, context.Canceled) {
		r.failing = true
		x.log.Warn("DNS resolver does not answer", "resolver", r.addr, "err", why)
	}
}

func (x *exchange) received(ctx context.Context, m message) {
	r := m.c.of
	if r.conn != m.c {
		return // of a connection that was given up
	}
	if m.err != nil {
		x.lost(ctx, r, m.err)
		return
	}
	q := r.asked[binary.BigEndian.Uint16(m.msg)]
	if q == nil || !matches(m.msg, q.msg(), q.q) {
		x.count.unmatched.Add(1)
		return
	}
	now := time.Now()
	r.used, r.heard, r.down = now, now, time.Time{}
	if r.failing {
		r.failing = false
		x.log.Info("DNS resolver answers again", "resolver", r.addr)
	}
	delete(r.asked, binary.BigEndian.Uint16(m.msg))
	rcode := binary.BigEndian.Uint16(m.msg[2:]) & 15
	if (rcode == rcodeServer || rcode == rcodeRefuse) && int(q.tried) != 1<<len(q.ways)-1 {
		q.best = m.msg
		x.ask(ctx, q)
		return
	}
	x.done(q, m.msg)
}

func (x *exchange) done(q *query, resp []byte) {
	delete(x.live, q)
	x.taken.Add(-1)
	x.finish(q, resp)
}

// fail ends q with the best answer that there is, or none.
func (x *exchange) fail(q *query) {
	x.done(q, q.best)
}

// expire looks at every deadline.
func (x *exchange) expire(ctx context.Context, now time.Time) {
	var late []*query
	for q := range x.live {
		if !now.Before(q.attempt) {
			late = append(late, q)
		}
	}
	for _, q := range late {
		if _, ok := x.live[q]; !ok || now.Before(q.attempt) {
			continue // its connection was given up for the one before it
		}
		r := q.at
		if r.conn == nil {
			// The dial takes long: it goes on for those to come, and this one tries elsewhere.
			x.unwait(r, q)
			x.ask(ctx, q)
			continue
		}
		delete(r.asked, binary.BigEndian.Uint16(q.msg()))
		if r.heard.Before(q.sent) { // nothing came since: it is the connection, not the question
			x.markDown(r, errors.New("no answer in time"))
			x.lost(ctx, r, errors.New("no answer in time"))
		}
		x.ask(ctx, q)
	}
	for r := range x.all() {
		if r.conn != nil && len(r.asked) == 0 && now.Sub(r.used) >= x.idleClose {
			x.lost(ctx, r, nil)
		}
	}
	for a, r := range x.asked {
		if r.conn == nil && r.cancel == nil {
			delete(x.asked, a)
		}
	}
}

func (x *exchange) unwait(r *resolver, q *query) {
	for i, w := range r.waiting {
		if w == q {
			r.waiting = append(r.waiting[:i], r.waiting[i+1:]...)
			return
		}
	}
}
