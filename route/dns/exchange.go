package dns

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"iter"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

const (
	minAttempt = time.Second            // for one resolver if there are others: a proxy may be 300 ms away and more
	downFor    = 30 * time.Second       // a resolver that failed is asked last for this time
	maxAsked   = 128                    // concurrent servers that are asked because the app named them
	tryAgain   = 200 * time.Millisecond // when all resolvers have failed, one that has just failed is not asked for this time
	tick       = 100 * time.Millisecond // precision of the deadlines
)

// exchange asks resolvers through the upstream, over the links of link.go. take may be called from any goroutine
// while run runs.
type exchange struct {
	dial      func(ctx context.Context, r Resolver, done func(fd int, err error))
	tls       *tls.Config // without a ServerName
	tor       TorFunc     // nil: no resolver is a Tor
	inFlight  int
	idleClose time.Duration
	log       *slog.Logger
	count     *counters // only dropped, unmatched and connections are counted here

	// finish is called once for each query that take has accepted, from run's goroutine: with the answer of a
	// resolver, which it may keep, or with nil if none has answered. It is not called if run ends first.
	finish func(q *query, resp []byte)

	taken atomic.Int32 // queries between take and finish, at most inFlight
	in    chan *query
	dials chan dialed  // one place for each resolver, so done never blocks
	msgs  chan message // from connections
	over  chan struct{}

	// The fields below belong to run.
	resolvers []*resolver
	asked     map[Resolver]*resolver // additional servers that the app asked, at most maxAsked
	live      map[*query]struct{}
}

// message is what arrived on a link.
type message struct {
	link link
	msg  []byte // an answer with the question's ID, or nil
	err  error  // why the link has ended or, if id is valid, why the question with this ID has no answer
	only bool   // it concerns only the question with id
	id   uint16
}

// query is a question in progress.
type query struct {
	wire     []byte // length and message, with the ID for the resolver
	q        question
	reply    func([]byte) // for finish
	key      string       // result of appendKey; empty: the answer is for this asker alone
	deadline time.Time
	to       Resolver // the server that the app asked, if the question must go there

	// The fields below belong to run.
	attempt time.Time // until when the current resolver may answer
	sent    time.Time
	ways    []*resolver // the resolvers that may be asked, in this order
	at      *resolver   // the one that was asked last
	tried   uint32      // those of ways that were tried, one bit each
	retried bool        // sent again because a connection ended that had worked
	best    []byte      // a SERVFAIL or REFUSED, in case there is no better answer
	bestOf  *resolver

	direct DirectServer // the server that has answered, if its address is valid
}

// answeredBy returns the server whose answer was used.
func (q *query) answeredBy() string {
	switch {
	case q.direct.Addr.IsValid():
		return q.direct.String()
	case q.at != nil:
		return q.at.Resolver.String()
	}
	return ""
}

func (q *query) msg() []byte { return q.wire[2:] }

type resolver struct {
	Resolver
	link    link               // nil: none is open
	cancel  context.CancelFunc // not nil: a dial is in progress
	waiting []*query           // wait for the dial
	asked   map[uint16]*query  // by the ID sent to the resolver
	used    time.Time          // when something was last sent or received
	heard   time.Time          // when the last answer came
	down    time.Time          // after a failure: it is asked last until then; zero: no failure since its last answer
	next    time.Time          // after a failure, if no other resolver is left: when it is tried again
	failing bool               // the failure was logged
}

// newExchange expects a Config with all defaults set.
func newExchange(cfg *Config, count *counters, finish func(q *query, resp []byte)) *exchange {
	x := &exchange{
		dial:      cfg.Dial,
		tls:       newTLSConfig(cfg.RootCAs),
		tor:       cfg.Tor,
		inFlight:  cfg.InFlight,
		idleClose: cfg.IdleClose,
		log:       cfg.Log,
		count:     count,
		finish:    finish,
		in:        make(chan *query, cfg.InFlight),
		dials:     make(chan dialed, len(cfg.Resolvers)+maxAsked),
		msgs:      make(chan message, 16),
		over:      make(chan struct{}),
		asked:     make(map[Resolver]*resolver),
		live:      make(map[*query]struct{}),
	}
	for _, r := range cfg.Resolvers {
		x.resolvers = append(x.resolvers, newResolver(r))
	}
	return x
}

func newResolver(r Resolver) *resolver {
	return &resolver{Resolver: r, asked: make(map[uint16]*query)}
}

// take accepts q and owns it from then on. It does not block. It returns false if too many questions are in progress
// or run has ended; the question is then counted as dropped, and finish is not called.
func (x *exchange) take(q *query) bool {
	select {
	case <-x.over:
		x.count.Dropped.Add(1)
		return false
	default:
	}
	if x.taken.Add(1) > int32(x.inFlight) {
		x.taken.Add(-1)
		x.count.Dropped.Add(1)
		return false
	}
	x.in <- q // it has room for all accepted queries
	return true
}

// run asks the resolvers until ctx ends. Then it closes the connections and leaves open questions unfinished. It may
// be called once.
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

// busy reports whether the ticker is needed.
func (x *exchange) busy() bool {
	if len(x.live) > 0 {
		return true
	}
	for r := range x.all() {
		if r.link != nil || r.cancel != nil {
			return true
		}
	}
	return false
}

// all returns the resolvers and the servers that the app named.
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

// ways returns who may be asked: the server to or, if it is the zero Resolver, the resolvers. It returns none if too
// many servers are being asked already.
func (x *exchange) ways(to Resolver) []*resolver {
	if to == (Resolver{}) {
		return x.resolvers
	}
	for _, r := range x.resolvers {
		if r.Resolver == to {
			return []*resolver{r}
		}
	}
	r := x.asked[to]
	if r == nil {
		if !x.makeRoom() {
			return nil
		}
		r = newResolver(to)
		x.asked[to] = r
	}
	return []*resolver{r}
}

// makeRoom reports whether one more server can be asked. It drops one that is remembered only because it failed.
func (x *exchange) makeRoom() bool {
	if len(x.asked) < maxAsked {
		return true
	}
	for a, r := range x.asked {
		if r.link == nil && r.cancel == nil {
			delete(x.asked, a)
			return true
		}
	}
	return false
}

func (x *exchange) teardown() {
	for r := range x.all() {
		if r.link != nil {
			r.link.close()
		}
	}
	for r := range x.all() {
		if r.link != nil {
			r.link.wait()
		}
		if r.cancel != nil { // the dial was cancelled with ctx, but done is still called
			r.cancel()
			d := <-x.dials
			d.close()
		}
	}
}

// idle reports whether no question waits for r.
func (r *resolver) idle() bool { return len(r.asked) == 0 && len(r.waiting) == 0 }

// mayAsk reports whether r may be asked now, and whether only as a last resort. A resolver that failed gets one
// question at a time, so that only this one can wait in vain.
func (r *resolver) mayAsk(now time.Time) (ok, last bool) {
	switch {
	case r.down.IsZero():
		return true, false
	case !r.idle(), r.cancel != nil, now.Before(r.next):
		return false, true
	}
	return true, now.Before(r.down)
}

// ask sends q to the first untried resolver that is not down, or else to one that is, or gives up.
func (x *exchange) ask(ctx context.Context, q *query) {
	now := time.Now()
	var to *resolver
	left, bit, toLast := 0, uint32(0), false
	for i, r := range q.ways {
		if q.tried&(1<<i) != 0 || r.Kind == Tor && !torKnows(q.msg(), &q.q) {
			continue
		}
		ok, last := r.mayAsk(now)
		if !ok {
			continue
		}
		left++
		if to == nil || toLast && (!last || r.down.Before(to.down)) {
			to, bit, toLast = r, 1<<i, last
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

// send sends q on r's link, or dials one.
func (x *exchange) send(ctx context.Context, r *resolver, q *query) {
	now := time.Now()
	q.at, q.sent = r, now
	if r.link == nil {
		r.waiting = append(r.waiting, q)
		if r.cancel == nil {
			var dctx context.Context
			dctx, r.cancel = context.WithCancel(ctx)
			x.connect(dctx, r)
		}
		return
	}
	id := uint16(rand.Uint32()) // ChaCha8, seeded by the system (RFC 5452, section 9.2)
	for r.asked[id] != nil {
		id = uint16(rand.Uint32())
	}
	binary.BigEndian.PutUint16(q.msg(), id)
	r.asked[id] = q
	r.used = now
	if !r.link.send(q) {
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
		r.link, d.err = d.link(x)
	}
	if d.err != nil {
		x.markDown(r, d.err)
	} else {
		x.count.Connections.Add(1)
		r.used = time.Now()
		r.heard = time.Time{}
	}
	for _, q := range waiting {
		if _, ok := x.live[q]; !ok || q.at != r {
			continue
		}
		// The link may be lost again while the queries are being sent.
		if d.err == nil {
			x.send(ctx, r, q)
		} else {
			x.ask(ctx, q)
		}
	}
}

// lost ends r's link and finds another way for the questions asked on it.
func (x *exchange) lost(ctx context.Context, r *resolver, why error) {
	r.link.close()
	r.link.wait()
	r.link = nil
	asked := r.asked
	r.asked = make(map[uint16]*query)
	served := !r.heard.IsZero()
	if len(asked) > 0 && !served {
		x.markDown(r, why)
	}
	for _, q := range asked {
		// RFC 7766, section 6.2.4: a resolver may close an idle connection at the moment when a question is being
		// sent.
		if served && !q.retried {
			q.retried = true
			x.send(ctx, r, q)
			continue
		}
		x.ask(ctx, q)
	}
}

func (x *exchange) markDown(r *resolver, why error) {
	now := time.Now()
	r.down, r.next = now.Add(downFor), now.Add(tryAgain)
	if !r.failing && !errors.Is(why, context.Canceled) {
		r.failing = true
		x.log.Warn("DNS resolver does not answer", "resolver", r.Resolver.String(), "err", why)
	}
}

func (x *exchange) received(ctx context.Context, m message) {
	r := m.link.resolver()
	if r.link != m.link {
		return // of a link that was already dropped
	}
	if m.err != nil && !m.only {
		x.lost(ctx, r, m.err)
		return
	}
	if m.err != nil {
		if q := r.asked[m.id]; q != nil {
			delete(r.asked, m.id)
			x.markDown(r, m.err)
			x.ask(ctx, q)
		}
		return
	}
	q := r.asked[binary.BigEndian.Uint16(m.msg)]
	if q == nil || !matches(m.msg, q.msg(), q.q) {
		x.count.Unmatched.Add(1)
		return
	}
	now := time.Now()
	r.used, r.heard, r.down = now, now, time.Time{}
	if r.failing {
		r.failing = false
		x.log.Info("DNS resolver answers again", "resolver", r.Resolver.String())
	}
	delete(r.asked, binary.BigEndian.Uint16(m.msg))
	rcode := binary.BigEndian.Uint16(m.msg[2:]) & 15
	if (rcode == rcodeServer || rcode == rcodeRefuse) && int(q.tried) != 1<<len(q.ways)-1 {
		q.best, q.bestOf = m.msg, r
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

// fail ends q with the best available answer, or none.
func (x *exchange) fail(q *query) {
	if q.best != nil {
		q.at = q.bestOf
	}
	x.done(q, q.best)
}

// expire checks every deadline.
func (x *exchange) expire(ctx context.Context, now time.Time) {
	var late []*query
	for q := range x.live {
		if !now.Before(q.attempt) {
			late = append(late, q)
		}
	}
	for _, q := range late {
		if _, ok := x.live[q]; !ok || now.Before(q.attempt) {
			continue // its connection was dropped because of an earlier question
		}
		r := q.at
		if r.link == nil {
			// The dial takes long. It continues for later questions, while this one tries another resolver.
			x.unwait(r, q)
			x.markDown(r, errors.New("no connection in time"))
			x.ask(ctx, q)
			continue
		}
		delete(r.asked, binary.BigEndian.Uint16(q.msg()))
		if r.heard.Before(q.sent) { // nothing has arrived since, so the connection is at fault and not the question
			x.markDown(r, errors.New("no answer in time"))
			x.lost(ctx, r, errors.New("no answer in time"))
		}
		x.ask(ctx, q)
	}
	for r := range x.all() {
		if r.link != nil && len(r.asked) == 0 && now.Sub(r.used) >= x.idleClose {
			x.lost(ctx, r, nil)
		}
	}
	for a, r := range x.asked {
		if r.link == nil && r.cancel == nil && !now.Before(r.down) {
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
