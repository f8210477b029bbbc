package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	defaultTimeout   = 5 * time.Second // glibc asks again after 5 s: later answers find nobody
	defaultInFlight  = 512
	defaultIdleClose = 20 * time.Second // RFC 7766 6.2.3: idle connections are the server's cost
	minAttempt       = time.Second      // for one resolver, when there are others: a proxy may be 300 ms away and more
	downFor          = 30 * time.Second // a resolver that failed is asked last for so long
	maxResolvers     = 16
	maxAsked         = 32                     // servers that are asked because the app named them, at a time
	tick             = 100 * time.Millisecond // how exact the deadlines are
)

// Config says where questions go. Dial and Resolvers must be set.
type Config struct {
	// Dial opens a TCP connection through the upstream: it returns at once and calls done exactly once, from any
	// goroutine, with a connected socket that the receiver owns. Cancelling ctx ends the dial.
	Dial      func(ctx context.Context, dst netip.AddrPort, done func(fd int, err error))
	Resolvers []netip.AddrPort // asked in this order: the next one when one fails, is silent, or says SERVFAIL or REFUSED
	Fake      FakeConfig       // with a Pool: questions for addresses are answered from it, and the rest goes to the resolvers
	Timeout   time.Duration    // for one question, all resolvers together; 0: 5 s
	InFlight  int              // questions at a time; those over it are dropped and counted; 0: 512
	IdleClose time.Duration    // an idle connection is closed after it; 0: 20 s
	Log       *slog.Logger     // nil: none
}

// Stats are counters since the start, in questions but for Unmatched.
type Stats struct {
	Questions   uint64 // taken from the app
	Answered    uint64 // with an answer of a resolver
	Own         uint64 // answered without one: fake addresses, and names that nobody must be asked for
	Truncated   uint64 // of those: cut to what the asker takes, with TC
	Failed      uint64 // answered SERVFAIL: no resolver answered
	Malformed   uint64 // answered FORMERR or NOTIMP, or not at all
	Refused     uint64 // answered REFUSED: the Judge said no
	Dropped     uint64 // over InFlight, or not running
	Unmatched   uint64 // answers of a resolver to nothing that was asked
	Connections uint64 // opened to resolvers
}

type counters struct {
	questions, answered, own, truncated, failed, malformed, refused, dropped, unmatched, connections atomic.Uint64
}

// Server answers questions while Run runs. Handle, Stats and Resolver may be called from any goroutine.
type Server struct {
	cfg   Config
	fake  *fake // nil: there are no fake addresses
	count counters

	in    chan *query  // from Handle
	dials chan dialed  // one place for each resolver: done never blocks
	msgs  chan message // from connections
	over  chan struct{}

	askers askers

	// Owned by Run.
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
	reply    func([]byte)
	deadline time.Time
	attempt  time.Time // until then this resolver has time
	sent     time.Time
	to       netip.AddrPort // the server that the app asked, if this must go there
	ways     []*resolver    // who may be asked, in this order
	at       *resolver
	tried    uint32 // of ways, a bit each
	retried  bool   // sent again because a connection ended that had served
	best     []byte // a SERVFAIL or REFUSED, for want of better
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

// New checks the configuration. Nothing runs until Run.
func New(cfg Config) (*Server, error) {
	if cfg.Dial == nil {
		return nil, errors.New("cannot answer DNS: no way to dial a resolver is given")
	}
	if n := len(cfg.Resolvers); n == 0 || n > maxResolvers {
		return nil, fmt.Errorf("cannot answer DNS: %d resolvers are given, from 1 to %d are possible", n, maxResolvers)
	}
	if cfg.Timeout < 0 || cfg.InFlight < 0 || cfg.IdleClose < 0 || cfg.InFlight > 1<<15 {
		return nil, errors.New("cannot answer DNS: a limit is out of its range")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultTimeout
	}
	if cfg.InFlight == 0 {
		cfg.InFlight = defaultInFlight
	}
	if cfg.IdleClose == 0 {
		cfg.IdleClose = defaultIdleClose
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg:   cfg,
		in:    make(chan *query, cfg.InFlight),
		dials: make(chan dialed, len(cfg.Resolvers)+maxAsked),
		msgs:  make(chan message, 16),
		over:  make(chan struct{}),
		asked: make(map[netip.AddrPort]*resolver),
		live:  make(map[*query]struct{}),
	}
	if cfg.Fake.Pool != nil {
		s.fake = &fake{pool: cfg.Fake.Pool, config: cfg.Fake}
	}
	for _, a := range cfg.Resolvers {
		if !canBeAsked(a) {
			return nil, fmt.Errorf("cannot answer DNS: %s is not the address and port of a resolver", a)
		}
		s.resolvers = append(s.resolvers, newResolver(a))
	}
	return s, nil
}

func newResolver(a netip.AddrPort) *resolver {
	return &resolver{addr: a, asked: make(map[uint16]*query)}
}

func canBeAsked(a netip.AddrPort) bool {
	return a.IsValid() && a.Port() != 0 && !a.Addr().IsUnspecified() && !a.Addr().IsMulticast()
}

// Resolver is the first resolver: where TCP to port 53 is carried.
func (s *Server) Resolver() netip.AddrPort { return s.resolvers[0].addr }

// Stats is a snapshot of the counters.
func (s *Server) Stats() Stats {
	c := &s.count
	return Stats{c.questions.Load(), c.answered.Load(), c.own.Load(), c.truncated.Load(), c.failed.Load(), c.malformed.Load(),
		c.refused.Load(), c.dropped.Load(), c.unmatched.Load(), c.connections.Load()}
}

// Handle takes one question that came by UDP. It does not block and does not keep msg. reply is called at most once,
// from Handle or from Run's goroutine, with bytes that are lent for the call; garbage and what is over InFlight gets no
// reply.
//
// asked is the server that the app sent it to, or the zero AddrPort if that is none that exists. QUERY goes to the
// resolvers whatever it is. Every other operation (UPDATE, NOTIFY) is about that server, and goes there.
func (s *Server) Handle(msg []byte, asked netip.AddrPort, reply func([]byte)) {
	s.HandleJudged(msg, asked, nil, reply)
}

// HandleJudged is Handle for an app whose questions judge decides on; nil: all are answered.
func (s *Server) HandleJudged(msg []byte, asked netip.AddrPort, judge Judge, reply func([]byte)) {
	s.handle(msg, asked, byUDP, judge, reply)
}

// Ask has the resolvers asked, also for what a fake address would be the answer to. reply is called as by Handle, with the
// whole answer however long it is. false: it will not be called.
func (s *Server) Ask(msg []byte, reply func([]byte)) bool {
	return s.handle(msg, netip.AddrPort{}, ours, nil, reply)
}

// way is how a question came.
type way uint8

const (
	byUDP way = iota
	byTCP     // the answer may be of any length
	ours      // the same, and it must be a resolver's
)

// handle reports whether reply is called, unless Run ends first.
func (s *Server) handle(msg []byte, asked netip.AddrPort, how way, judge Judge, reply func([]byte)) bool {
	s.count.questions.Add(1)
	q, v, rcode := parseQuestion(msg)
	switch v {
	case silence:
		s.count.malformed.Add(1)
		return false
	case answer:
		s.count.malformed.Add(1)
		reply(errorReply(msg, q, rcode))
		return true
	}
	if !judge.allows(msg, &q) {
		s.count.refused.Add(1)
		reply(errorReply(msg, q, rcodeRefuse))
		return true
	}
	if how != byUDP {
		q.size = maxMessage
	}
	if s.fake != nil && how != ours && q.isQuery() && s.answerItself(msg, &q, reply) {
		return true
	}
	wire := make([]byte, 2+len(msg))
	binary.BigEndian.PutUint16(wire, uint16(len(msg)))
	copy(wire[2:], msg)
	select {
	case <-s.over:
		s.count.dropped.Add(1)
		return false
	default:
	}
	if q.isQuery() || !canBeAsked(asked) {
		asked = netip.AddrPort{}
	}
	select {
	case s.in <- &query{wire: wire, q: q, to: asked, reply: reply, deadline: time.Now().Add(s.cfg.Timeout)}:
	default:
		s.count.dropped.Add(1)
		return false
	}
	return true
}

// answerBuffers hold the answers that need no resolver while reply reads them.
var answerBuffers = sync.Pool{New: func() any { return new([maxFakeAnswer]byte) }}

// answerItself replies if no resolver is needed, and reports whether it has. It works whether or not Run runs.
func (s *Server) answerItself(msg []byte, q *question, reply func([]byte)) bool {
	buf := answerBuffers.Get().(*[maxFakeAnswer]byte)
	defer answerBuffers.Put(buf)
	b, o := s.fake.answer(buf[:0], msg, q)
	switch o {
	case passed:
		return false
	case full:
		s.count.failed.Add(1)
	default:
		s.count.own.Add(1)
	}
	reply(b)
	return true
}

// Run carries questions until ctx ends; then it closes the connections, leaves open questions without a reply and
// returns nil. It may be called once.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	timer := time.NewTimer(tick)
	defer timer.Stop()
	ticking := true
	for {
		if !ticking && s.busy() {
			timer.Reset(tick)
			ticking = true
		}
		select {
		case <-ctx.Done():
			close(s.over)
			cancel()
			s.teardown()
			return nil
		case q := <-s.in:
			if len(s.live) >= s.cfg.InFlight {
				s.count.dropped.Add(1)
				continue
			}
			s.live[q] = struct{}{}
			q.ways = s.ways(q.to)
			s.ask(ctx, q)
		case d := <-s.dials:
			s.dialed(ctx, d)
		case m := <-s.msgs:
			s.received(ctx, m)
		case <-timer.C:
			ticking = false
			s.expire(ctx, time.Now())
		}
	}
}

// busy reports whether the clock is needed.
func (s *Server) busy() bool {
	if len(s.live) > 0 {
		return true
	}
	for r := range s.all() {
		if r.conn != nil || r.cancel != nil {
			return true
		}
	}
	return false
}

// all yields the resolvers, and the servers that the app named.
func (s *Server) all() iter.Seq[*resolver] {
	return func(yield func(*resolver) bool) {
		for _, r := range s.resolvers {
			if !yield(r) {
				return
			}
		}
		for _, r := range s.asked {
			if !yield(r) {
				return
			}
		}
	}
}

// ways are who may be asked: the resolvers, or the server to if it is valid. None: too many servers are asked already.
func (s *Server) ways(to netip.AddrPort) []*resolver {
	if !to.IsValid() {
		return s.resolvers
	}
	for _, r := range s.resolvers {
		if r.addr == to {
			return []*resolver{r}
		}
	}
	r := s.asked[to]
	if r == nil {
		if len(s.asked) >= maxAsked {
			return nil
		}
		r = newResolver(to)
		s.asked[to] = r
	}
	return []*resolver{r}
}

func (s *Server) teardown() {
	s.askers.close()
	for r := range s.all() {
		if r.conn != nil {
			r.conn.close()
		}
	}
	for r := range s.all() {
		if r.conn != nil {
			r.conn.wait()
		}
		if r.cancel != nil { // the dial was cancelled with ctx, and done comes all the same
			r.cancel()
			d := <-s.dials
			if d.err == nil {
				closeFD(d.fd)
			}
		}
	}
}

// ask gives q to the first resolver that was not tried and is not down, or failing that to one that is, or gives up.
func (s *Server) ask(ctx context.Context, q *query) {
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
		s.fail(q)
		return
	}
	q.tried |= bit
	q.attempt = q.deadline
	if left > 1 {
		q.attempt = now.Add(max(q.deadline.Sub(now)/time.Duration(left), minAttempt))
	}
	s.send(ctx, to, q)
}

// send puts q on r's connection, or dials one.
func (s *Server) send(ctx context.Context, r *resolver, q *query) {
	now := time.Now()
	q.at, q.sent = r, now
	if r.conn == nil {
		r.waiting = append(r.waiting, q)
		if r.cancel == nil {
			var dctx context.Context
			dctx, r.cancel = context.WithCancel(ctx)
			s.cfg.Dial(dctx, r.addr, func(fd int, err error) { s.dials <- dialed{r, fd, err} })
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
		s.lost(ctx, r, errors.New("it does not take what is sent"))
	}
}

func (s *Server) dialed(ctx context.Context, d dialed) {
	r := d.r
	r.cancel()
	r.cancel = nil
	waiting := r.waiting
	r.waiting = nil
	if d.err == nil {
		r.conn, d.err = newConn(d.fd, s, r)
	}
	if d.err != nil {
		s.markDown(r, d.err)
	} else {
		s.count.connections.Add(1)
		r.used = time.Now()
		r.heard = time.Time{}
	}
	for _, q := range waiting {
		if _, ok := s.live[q]; !ok || q.at != r {
			continue
		}
		// The connection may be lost again while the queries are put on it.
		if d.err == nil {
			s.send(ctx, r, q)
		} else {
			s.ask(ctx, q)
		}
	}
}

// lost ends r's connection and finds another way for what was asked on it.
func (s *Server) lost(ctx context.Context, r *resolver, why error) {
	r.conn.close()
	r.conn.wait()
	r.conn = nil
	asked := r.asked
	r.asked = make(map[uint16]*query)
	served := !r.heard.IsZero()
	if len(asked) > 0 && !served {
		s.markDown(r, why)
	}
	for _, q := range asked {
		// RFC 7766 6.2.4: a resolver may close an idle connection just when a question is on its way.
		if served && !q.retried {
			q.retried = true
			s.send(ctx, r, q)
			continue
		}
		s.ask(ctx, q)
	}
}

func (s *Server) markDown(r *resolver, why error) {
	r.down = time.Now().Add(downFor)
	if !r.failing && !errors.Is(why, context.Canceled) {
		r.failing = true
		s.cfg.Log.Warn("DNS resolver does not answer", "resolver", r.addr, "err", why)
	}
}

func (s *Server) received(ctx context.Context, m message) {
	r := m.c.of
	if r.conn != m.c {
		return // of a connection that was given up
	}
	if m.err != nil {
		s.lost(ctx, r, m.err)
		return
	}
	q := r.asked[binary.BigEndian.Uint16(m.msg)]
	if q == nil || !matches(m.msg, q.msg(), q.q) {
		s.count.unmatched.Add(1)
		return
	}
	now := time.Now()
	r.used, r.heard, r.down = now, now, time.Time{}
	if r.failing {
		r.failing = false
		s.cfg.Log.Info("DNS resolver answers again", "resolver", r.addr)
	}
	delete(r.asked, binary.BigEndian.Uint16(m.msg))
	rcode := binary.BigEndian.Uint16(m.msg[2:]) & 15
	if (rcode == rcodeServer || rcode == rcodeRefuse) && int(q.tried) != 1<<len(q.ways)-1 {
		q.best = m.msg
		s.ask(ctx, q)
		return
	}
	s.done(q, m.msg)
}

func (s *Server) done(q *query, resp []byte) {
	delete(s.live, q)
	s.count.answered.Add(1)
	out, truncated := udpReply(resp, q.msg(), q.q)
	if truncated {
		s.count.truncated.Add(1)
	}
	q.reply(out)
}

func (s *Server) fail(q *query) {
	if q.best != nil {
		s.done(q, q.best)
		return
	}
	delete(s.live, q)
	s.count.failed.Add(1)
	q.reply(errorReply(q.msg(), q.q, rcodeServer))
}

// expire looks at every deadline.
func (s *Server) expire(ctx context.Context, now time.Time) {
	var late []*query
	for q := range s.live {
		if !now.Before(q.attempt) {
			late = append(late, q)
		}
	}
	for _, q := range late {
		if _, ok := s.live[q]; !ok || now.Before(q.attempt) {
			continue // its connection was given up for the one before it
		}
		r := q.at
		if r.conn == nil {
			// The dial takes long: it goes on for those to come, and this one tries elsewhere.
			s.unwait(r, q)
			s.ask(ctx, q)
			continue
		}
		delete(r.asked, binary.BigEndian.Uint16(q.msg()))
		if r.heard.Before(q.sent) { // nothing came since: it is the connection, not the question
			s.markDown(r, errors.New("no answer in time"))
			s.lost(ctx, r, errors.New("no answer in time"))
		}
		s.ask(ctx, q)
	}
	for r := range s.all() {
		if r.conn != nil && len(r.asked) == 0 && now.Sub(r.used) >= s.cfg.IdleClose {
			s.lost(ctx, r, nil)
		}
	}
	for a, r := range s.asked {
		if r.conn == nil && r.cancel == nil {
			delete(s.asked, a)
		}
	}
}

func (s *Server) unwait(r *resolver, q *query) {
	for i, w := range r.waiting {
		if w == q {
			r.waiting = append(r.waiting[:i], r.waiting[i+1:]...)
			return
		}
	}
}
