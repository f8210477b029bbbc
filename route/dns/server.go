package dns

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/count"
)

const (
	defaultTimeout   = 5 * time.Second // glibc asks again after 5 s, so later answers are not received
	defaultInFlight  = 512
	defaultIdleClose = 20 * time.Second // RFC 7766, section 6.2.3: idle connections cost the server
	maxResolvers     = 16
)

// Config is the configuration of a Server. Dial and Resolvers must be set.
type Config struct {
	// Dial opens a TCP connection to a resolver through the upstream, to its address, or to its name if it has no
	// address. It returns at once and calls done exactly once, from any goroutine, with a connected stream socket
	// that the receiver owns. Cancelling ctx ends the dial.
	Dial      func(ctx context.Context, r Resolver, done func(fd int, err error))
	Resolvers []Resolver     // asked in this order: the next one if one fails, is silent, or answers SERVFAIL or REFUSED
	RootCAs   *x509.CertPool // for resolvers of kind TLS and HTTPS; nil: the system's authorities
	Tor       TorFunc        // required if a resolver is of kind Tor
	// Relay means that a question goes to the server that the app asked, if that can exist, instead of Resolvers.
	Relay bool
	// Own is answered whatever the other fields say, even before a Judge.
	Own  OwnName
	Fake FakeConfig // with a Pool, it answers questions for addresses; the rest goes to the resolvers
	// Zones have their own servers, even if there are fake addresses. The longest matching suffix of a name decides.
	Zones []Zone
	// HostServers returns the current servers of the host, for zones without others and for HostNames. It is called
	// for each question, from any goroutine. nil: there are none.
	HostServers func() []DirectServer
	// HostNames reports whether a name, in the form of Fake.Real, is looked up at HostServers. Such a name has no
	// fake address. nil: none.
	HostNames func(name []byte) bool
	// DialDirect connects to an address and port without the upstream. It is required for HostServers and for Zones
	// with Direct servers.
	DialDirect func(ctx context.Context, network, address string) (net.Conn, error)

	Timeout   time.Duration // for one question, at all resolvers together; 0: 5 s
	InFlight  int           // concurrent questions; further ones are dropped and counted; 0: 512
	IdleClose time.Duration // when an idle connection is closed; 0: 20 s
	Log       *slog.Logger  // nil: none
}

// Counters is the table of a Server's counters; see package count. They count questions, except Unmatched and
// Connections.
type Counters[T any] struct {
	Questions T `metric:"dns_questions_total" help:"Questions of programs to port 53."`
	// Answered by a resolver.
	Answered T `metric:"dns_answers_total" label:"by=resolver" help:"Questions by who answered them."`
	// Sent by UDP to the server that the app asked; its answer is not seen here.
	Relayed T `metric:"dns_answers_total" label:"by=relay"`
	// Answered without a resolver: fake addresses, and names that no resolver must be asked for.
	Own T `metric:"dns_answers_total" label:"by=viasocks"`
	// Answered from the cache.
	Cached T `metric:"dns_answers_total" label:"by=cache"`
	// Those answered by a resolver that got the answer to the same question of another asker.
	Shared T `metric:"dns_shared_total" help:"Questions that got the answer to the same question of another program."`
	// Those answered that were truncated, with TC, to the size that the asker accepts.
	Truncated T `metric:"dns_truncated_total" help:"Answers that were cut to what the program takes."`
	// Answered SERVFAIL, because no resolver answered.
	Failed T `metric:"dns_failed_total" label:"reason=no_answer" help:"Questions that were not answered."`
	// Answered FORMERR or NOTIMP, or not at all.
	Malformed T `metric:"dns_failed_total" label:"reason=malformed"`
	// Answered REFUSED, because of the Judge.
	Refused T `metric:"dns_failed_total" label:"reason=not_allowed" lost:"questions of DNS that --allow refuses"`
	// Dropped because of InFlight, or because Run is not running.
	Dropped T `metric:"dns_failed_total" label:"reason=too_many" lost:"questions of DNS over the limit"`
	// Answers of a resolver that match no question.
	Unmatched T `metric:"dns_unmatched_total" help:"Answers of resolvers to nothing that was asked."`
	// Connections to resolvers that were opened.
	Connections T `metric:"dns_connections_total" help:"Connections to resolvers that were opened."`
}

// Stats is a snapshot of the counters.
type Stats struct {
	Counters[uint64]
	// The current number of cached answers, and their bytes.
	CacheEntries int `metric:"dns_cache_entries" help:"Answers of resolvers that are kept."`
	CacheBytes   int `metric:"dns_cache_bytes" help:"Bytes that the kept answers take."`
}

type counters struct{ Counters[atomic.Uint64] }

// Server answers questions while Run runs. Handle, Stats and Carries may be called from any goroutine.
type Server struct {
	cfg   Config
	fake  fake
	site  bool // all resolvers have private addresses
	count counters

	exchange *exchange // asks the resolvers
	cache    *cache
	flights  flights
	split    split // names for which others than exchange are asked

	askers askers
}

// New checks the configuration. Nothing runs until Run.
func New(cfg Config) (*Server, error) {
	if cfg.Dial == nil {
		return nil, errors.New("cannot answer DNS: no way to dial a resolver is given")
	}
	if err := checkResolvers(cfg.Resolvers, cfg.Tor); err != nil {
		return nil, err
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
	s := &Server{cfg: cfg, cache: newCache(cacheEntries, cacheBytes), flights: flights{most: cfg.InFlight}}
	s.exchange = newExchange(&s.cfg, &s.count, s.finish)
	var err error
	if s.split, err = newSplit(&s.cfg, &s.count, s.finish); err != nil {
		return nil, err
	}
	s.fake = fake{config: FakeConfig{Onion: func() bool { return onlyTor(cfg.Resolvers) }}}
	s.site = allPrivate(cfg.Resolvers)
	if cfg.Fake.Pool != nil {
		if real, host := cfg.Fake.Real, cfg.HostNames; host != nil {
			cfg.Fake.Real = func(name []byte) bool { return real != nil && real(name) || host(name) }
		}
		s.fake = fake{pool: cfg.Fake.Pool, config: cfg.Fake}
	}
	return s, nil
}

func checkResolvers(all []Resolver, tor TorFunc) error {
	if n := len(all); n == 0 || n > maxResolvers {
		return fmt.Errorf("cannot answer DNS: %d resolvers are given, from 1 to %d are possible", n, maxResolvers)
	}
	for _, r := range all {
		if err := r.check(); err != nil {
			return fmt.Errorf("cannot answer DNS: %s %w", r, err)
		}
		if r.Kind == Tor && tor == nil {
			return errors.New("cannot answer DNS: no way to ask a Tor is given")
		}
	}
	return nil
}

// Carries returns the first resolver, and whether TCP to port 53 can be carried to it unchanged.
func (s *Server) Carries() (Resolver, bool) {
	r := s.cfg.Resolvers[0]
	return r, r.Kind == TCP
}

// Stats returns a snapshot of the counters.
func (s *Server) Stats() (st Stats) {
	count.Add(&st.Counters, &s.count.Counters)
	st.CacheEntries, st.CacheBytes = s.cache.usage()
	return st
}

// Handle processes one question that arrived by UDP. It does not block and does not keep msg. reply is called at most
// once, from Handle or from Run's goroutine, with bytes that are valid only during the call. Garbage, and questions
// over InFlight, get no reply.
//
// asked is the server to which the app sent the question, or the zero AddrPort if no such server can exist. It may be a
// fake address: the server is then the one with that name. A QUERY goes to the resolvers whatever it is, except with
// Config.Relay. Every other operation (such as UPDATE and NOTIFY) concerns that server, and goes there.
func (s *Server) Handle(msg []byte, asked netip.AddrPort, reply func([]byte)) {
	s.HandleJudged(msg, asked, nil, reply)
}

// HandleJudged is Handle with a judge that decides whether to answer; nil: all questions are answered.
func (s *Server) HandleJudged(msg []byte, asked netip.AddrPort, judge Judge, reply func([]byte)) {
	s.handle(msg, asked, byUDP, judge, nil, always(reply))
}

// Relays reports whether questions go to the server that the app asked.
func (s *Server) Relays() bool { return s.cfg.Relay }

// HandleRelayed is HandleJudged with a function that sends the datagram to the server that the app asked, or returns
// false if that is impossible. relay is called if the question is for this server, at most once and before
// HandleRelayed returns. What it cannot send is asked over TCP.
//
// An answer that is known at once is given to now, before HandleRelayed returns. Otherwise later is called, and returns the
// reply function. Neither now nor later is kept, so that a question which is answered at once allocates nothing.
func (s *Server) HandleRelayed(
	msg []byte, asked netip.AddrPort, judge Judge, relay func() bool, now func([]byte), later func() func([]byte),
) {
	s.handle(msg, asked, byUDP, judge, relay, replies{now, later})
}

// Ask asks the resolvers even if the answer would be a fake address. reply is called as by Handle, with the whole
// answer, however long. If Ask returns false, reply will not be called.
func (s *Server) Ask(msg []byte, reply func([]byte)) bool {
	return s.handle(msg, netip.AddrPort{}, ours, nil, nil, always(reply))
}

// replies are the two ways to answer: at once, and by the function that later returns, which is the only one that is kept.
type replies struct {
	now   func([]byte)
	later func() func([]byte)
}

// always answers in the same way at once and later.
func always(reply func([]byte)) replies { return replies{reply, func() func([]byte) { return reply }} }

// way tells how a question arrived.
type way uint8

const (
	byUDP way = iota
	byTCP     // the answer may have any length
	ours      // the same, and the answer must come from a resolver
)

// handle reports whether an answer is given, unless Run ends first.
func (s *Server) handle(
	msg []byte, asked netip.AddrPort, how way, judge Judge, relay func() bool, reply replies,
) bool {
	s.count.Questions.Add(1)
	q, v, rcode := parseQuestion(msg)
	s.follow(msg, &q)
	switch v {
	case silence:
		s.count.Malformed.Add(1)
		s.tell(&q, howMalformed, "", nil)
		return false
	case answer:
		s.count.Malformed.Add(1)
		s.refuse(msg, &q, howMalformed, rcode, reply.now)
		return true
	}
	if s.cfg.Own.Name != "" && how != ours && s.answerOwn(msg, &q, reply.now) {
		return true
	}
	if !judge.allows(msg, &q) {
		s.count.Refused.Add(1)
		s.refuse(msg, &q, howRefused, rcodeRefuse, reply.now)
		return true
	}
	if how != byUDP {
		q.size = maxMessage
	}
	var to asking = s.exchange
	toAsked := s.cfg.Relay && canBeAsked(asked)
	if q.isQuery() {
		if zone := s.split.zone(msg, &q); zone != nil {
			to = zone
		} else if (!toAsked || s.fake.pool != nil) && how != ours &&
			s.answerItself(msg, &q, s.isSite(toAsked, asked), reply.now) {
			return true
		} else if s.split.ofHost(msg, &q) {
			to = s.split.host
		}
	}
	relayed := toAsked && to == s.exchange
	var server Resolver
	if relayed || !q.isQuery() {
		server = s.serverAt(asked)
	}
	if relayed && server.Addr.Addr().IsValid() && relay != nil && relay() { // a name is asked over TCP
		s.count.Relayed.Add(1)
		if q.trace != nil {
			s.tell(&q, howRelayed, "udp://"+asked.String(), nil)
		}
		return true
	}
	return s.ask(to, msg, &q, server, reply)
}

// refuse replies with an error without asking a resolver.
func (s *Server) refuse(msg []byte, q *question, how string, rcode uint16, reply func([]byte)) {
	b := errorReply(msg, *q, rcode)
	s.tell(q, how, "", b)
	reply(b)
}

// ask asks a server by way, unless the answer is in the cache or the same question is in progress. Its result is that
// of handle.
func (s *Server) ask(way asking, msg []byte, q *question, to Resolver, how replies) bool {
	var room [keyLen]byte
	key, shared := appendKey(room[:0], msg, q, to)
	now := time.Now()
	deadline := now.Add(s.cfg.Timeout)
	var reply func([]byte)
	if shared {
		if s.answerCached(key, msg, q, now, how.now) {
			return true
		}
		reply = how.later()
		switch s.flights.join(key, msg, q, reply, now, deadline.Add(time.Second)) {
		case follows:
			return true
		case tooMany:
			s.count.Dropped.Add(1)
			s.tell(q, howDropped, "", nil)
			return false
		}
	} else {
		key, reply = nil, how.later()
	}
	wire := make([]byte, 2+len(msg))
	binary.BigEndian.PutUint16(wire, uint16(len(msg)))
	copy(wire[2:], msg)
	asked := &query{wire: wire, q: *q, to: to, reply: reply, key: string(key), deadline: deadline}
	if way.take(asked) {
		return true
	}
	s.tell(q, howDropped, "", nil)
	s.finishOthers(asked, nil)
	return false
}

// replyBuffers hold answers from the cache while reply reads them.
var replyBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 2048); return &b }}

// answerCached replies if the answer is in the cache, and reports whether it was. It works whether or not Run runs.
func (s *Server) answerCached(key, msg []byte, q *question, now time.Time, reply func([]byte)) bool {
	buf := replyBuffers.Get().(*[]byte)
	defer replyBuffers.Put(buf)
	b, truncated, ok := s.cache.get((*buf)[:0], key, msg, q, now)
	if !ok {
		return false
	}
	if cap(b) > cap(*buf) {
		*buf = b[:0]
	}
	s.count.Cached.Add(1)
	if truncated {
		s.count.Truncated.Add(1)
	}
	s.tell(q, howCache, "", b)
	reply(b)
	return true
}

// Forget empties the cache. It is called when other resolvers or rules are in force.
func (s *Server) Forget() { s.cache.clear() }

// finish replies to q, and to everybody who asked the same question meanwhile, with the answer of a resolver, or with
// SERVFAIL if resp is nil.
func (s *Server) finish(q *query, resp []byte) {
	s.finishOthers(q, resp)
	if resp == nil {
		s.fail(q.msg(), &q.q, q.reply)
		return
	}
	out, truncated := udpReply(resp, q.msg(), q.q)
	if q.q.trace != nil {
		s.tell(&q.q, howResolver, q.answeredBy(), out)
	}
	s.answered(out, truncated, q.reply)
}

// fail replies that no resolver has answered.
func (s *Server) fail(msg []byte, q *question, reply func([]byte)) {
	s.count.Failed.Add(1)
	s.refuse(msg, q, howFailed, rcodeServer, reply)
}

func (s *Server) answered(out []byte, truncated bool, reply func([]byte)) {
	s.count.Answered.Add(1)
	if truncated {
		s.count.Truncated.Add(1)
	}
	reply(out)
}

// finishOthers stores the answer to q in the cache, and replies to the other askers of the same question.
func (s *Server) finishOthers(q *query, resp []byte) {
	if q.key == "" {
		return
	}
	var plain []byte
	if resp != nil {
		plain = plainAnswer(resp, q.q.qtype)
		s.cache.put(q.key, plain, q.q.qtype, time.Now())
	}
	for _, w := range s.flights.land(q.key) {
		s.count.Shared.Add(1)
		switch {
		case resp == nil:
			s.fail(w.head, &w.q, w.reply)
		case plain == nil: // only the asker can interpret it
			out, truncated := udpReply(append([]byte(nil), resp...), w.head, w.q)
			s.tell(&w.q, howShared, "", out)
			s.answered(out, truncated, w.reply)
		default:
			out, truncated := asAsked(nil, plain, w.head, &w.q, 0)
			s.tell(&w.q, howShared, "", out)
			s.answered(out, truncated, w.reply)
		}
	}
}

// answerBuffers hold answers that need no resolver while reply reads them.
var answerBuffers = sync.Pool{New: func() any { return new([maxFakeAnswer]byte) }}

// answerItself replies if no resolver is needed, and reports whether it has. It works whether or not Run runs.
func (s *Server) answerItself(msg []byte, q *question, site bool, reply func([]byte)) bool {
	buf := answerBuffers.Get().(*[maxFakeAnswer]byte)
	defer answerBuffers.Put(buf)
	b, o := s.fake.answer(buf[:0], msg, q, site)
	how := howOwn
	switch o {
	case passed:
		return false
	case full:
		s.count.Failed.Add(1)
		how = howFailed
	case faked:
		how = howFake
		fallthrough
	default:
		s.count.Own.Add(1)
	}
	s.tell(q, how, "", b)
	reply(b)
	return true
}

// Run processes questions until ctx ends. Then it closes the connections, leaves open questions without a reply, and
// returns nil. It may be called once.
func (s *Server) Run(ctx context.Context) error {
	var others sync.WaitGroup
	others.Go(func() { s.split.run(ctx) })
	s.exchange.run(ctx)
	s.askers.close()
	others.Wait()
	return nil
}
