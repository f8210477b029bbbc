package route

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/flow"
)

type eventKind uint8

const (
	evOpen        eventKind = iota // an association is wanted
	evDone                         // OpenPackets called done
	evClosed                       // an open link failed
	evDiscard                      // a link is no longer wanted
	evBack                         // a server of the upstream works again
	evFar                          // the address of a name was found
	evLater                        // a datagram to a name is looked at again
	evTrialEnded                   // what waited for a trial is sent
	evTrial                        // a name had its time to answer
	evUnreachable                  // the app's kernel reports that the socket is gone
)

type event struct {
	kind  eventKind
	a     *assoc
	m     *mapping
	t     *try
	up    *upstream
	far   *farAnswer
	later *laterPacket
	dest  *namedDest
	trial *trial
	shard *shard
	link  relay.PacketLink
	err   error
}

// mailbox takes events from any goroutine without blocking. The number of mappings limits its length: there are a few
// events for each.
type mailbox struct {
	mu     sync.Mutex
	events []event
	wake   chan struct{}
}

func (b *mailbox) post(e event) {
	b.mu.Lock()
	b.events = append(b.events, e)
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take returns the waiting events. spare is the previous result of take, whose memory is reused.
func (b *mailbox) take(spare []event) []event {
	clear(spare)
	b.mu.Lock()
	defer b.mu.Unlock()
	events := b.events
	b.events = spare[:0]
	return events
}

// control is the state of Run. No other goroutine uses it.
type control struct {
	opening int      // tries whose done was not called yet
	waiting []*assoc // until opening falls below the limit
	tooLong bool     // a warning about datagrams that are too large was logged

	// For the checks of sockets: the time of the next one, and memory for each.
	nextLook int64
	bound    boundSet
	looked   []*mapping
	streams  []*stream
}

const (
	sweepEvery = time.Second
	sweepPart  = 8 // a sweep checks one of this many parts, but at least sweepMin
	sweepMin   = 64

	retryFirst = 250 * time.Millisecond
	retryMax   = 30 * time.Second
	livedLong  = 10 * time.Second // an association that lived this long is made again at once
)

// Some servers end an association if one datagram cannot be sent (sing-box, trojan). An association that has
// delivered an answer is made again at once, but not more often than this.
const reopenFloor = 100 * time.Millisecond

// handle does what would take the frame reader too long.
func (r *Router) handle(e event) {
	switch e.kind {
	case evOpen:
		r.firstLook(e.a.m)
		e.a.m.s.open(e.a)
	case evDone:
		e.t.a.m.s.opened(e)
	case evClosed:
		if e.t != nil {
			e.t.a.m.s.closed(e)
		}
	case evFar:
		e.far.s.found(e.far)
	case evLater:
		e.later.s.carryLater(&e.later.q)
	case evTrialEnded:
		e.shard.afterTrial(e.trial)
	case evTrial:
		e.m.s.trialOver(e.m, e.dest)
	case evUnreachable:
		e.m.s.unreachable(e.m)
	case evBack:
		for _, s := range r.shards {
			s.back(e.up)
		}
	case evDiscard:
		if e.t != nil {
			e.t.cancel()
		}
		if e.link != nil {
			r.closeLink(e.up, e.link)
		}
	}
}

func (r *Router) closeLink(up *upstream, l relay.PacketLink) {
	overflowed := l.Overflowed()
	_ = l.Close() // nothing can be done about an error of a link that is given up
	s := l.Stats()
	s.Overflowed = overflowed
	count.Add(&up.count.links, &s)
	if s.TooLarge > 0 && !r.control.tooLong {
		r.control.tooLong = true
		r.log.post(
			slog.LevelWarn,
			"datagrams were too large for the proxy's encapsulation and were dropped",
			slog.Uint64("datagrams", s.TooLarge),
		)
	}
}

// open starts a try for a, or makes it wait.
func (r *shard) open(a *assoc) {
	r.udp.mu.Lock()
	if a.m.gone.Load() || a.m.assocOf(a.up) != a || a.link != nil || a.try != nil {
		r.udp.mu.Unlock()
		return
	}
	if r.control.opening >= r.cfg.Limits.Associations {
		most := r.udp.most
		r.udp.mu.Unlock()
		if r.control.waiting = append(r.control.waiting, a); len(r.control.waiting) > 2*most {
			r.control.waiting = slices.DeleteFunc(r.control.waiting, func(a *assoc) bool { return a.m.gone.Load() })
		}
		return
	}
	ctx, cancel := context.WithCancel(r.ctx)
	t := &try{a: a, cancel: cancel}
	a.try = t
	r.udp.dialing++
	r.udp.mu.Unlock()
	r.control.opening++
	m, w := a.m, r.loopW[a.loop]
	a.up.OpenPackets(socks.WithSource(ctx, m.src.Addr()), r.loops[a.loop],
		func(pkts []flow.Packet) {
			if !a.up.heard.Load() {
				a.up.heardUDP(r.Router)
			}
			r.deliver(a, w, pkts)
		},
		func(l relay.PacketLink, err error) { r.ctl.post(event{kind: evDone, t: t, link: l, err: err}) },
		func(err error) { r.ctl.post(event{kind: evClosed, t: t, err: err}) })
}

// next starts waiting tries while the limit allows.
func (r *Router) next() {
	for len(r.control.waiting) > 0 && r.control.opening < r.cfg.Limits.Associations {
		a := r.control.waiting[0]
		r.control.waiting = r.control.waiting[1:]
		a.m.s.open(a)
	}
}

func (r *shard) opened(e event) {
	t, a := e.t, e.t.a
	r.control.opening--
	defer r.next()
	if e.err == nil && t.closed {
		r.closeLink(a.up, e.link)
		e.link, e.err = nil, t.why
	}
	r.udp.mu.Lock()
	if a.try != t { // no longer wanted
		r.udp.mu.Unlock()
		t.cancel()
		if e.link != nil {
			r.closeLink(a.up, e.link)
		}
		return
	}
	r.udp.dialing--
	a.up.count.associated(e.err)
	if e.err != nil {
		a.try = nil
		r.failed(a, e.err)
		r.udp.mu.Unlock()
		t.cancel()
		return
	}
	a.link, a.opened = e.link, r.now() // its failures are forgotten once it has delivered or lived long enough: see closed
	a.m.nameAll(a)
	a.m.event(FlowEstablished)
	items := r.udp.take(a)
	pkts := make([]flow.Packet, 0, len(items))
	for i := range items {
		if r.now()-items[i].at > int64(queueAge) {
			r.count.QueueFull.Add(1)
			continue
		}
		pkts = append(pkts, items[i].packet(a.m.src))
	}
	if len(pkts) > 0 {
		if _, err := a.link.Send(pkts); err != nil {
			r.unsent(r.ctlW, t, err)
		}
	}
	r.udp.mu.Unlock()
}

// failed decides what to do about an association that could not be opened. The caller holds udp.mu.
func (r *shard) failed(a *assoc, err error) {
	if r.ctx.Err() != nil {
		return
	}
	if why, final := udpRefused(err); final {
		r.refuseUDP(a, why, err)
		return
	}
	a.failures++
	if errors.Is(err, socks.ErrEnded) { // OpenSSH -D has no UDP and ends like this; a single case proves little
		if a.up.deaf.Add(1) >= deafAfter {
			r.refuseUDP(a, flow.RefusePort, errEndsRequests)
			return
		}
		r.again(a)
		return
	}
	if isShortage(err) {
		r.short(err)
		a.failures = min(a.failures, refuseAfter-1) // what waits continues to wait
		r.again(a)
		return
	}
	if a.failures >= refuseAfter {
		r.refuseQueue(a, flow.RefuseNet)
	}
	a.up.failedUDP(r.Router, err)
	r.again(a)
}

// refuseQueue refuses each waiting datagram to the app. DNS questions that were to be relayed are sent another way.
func (r *shard) refuseQueue(a *assoc, why flow.Refusal) {
	relays := r.relaysQuestions() && a.failures < refuseAfter
	for _, q := range r.udp.take(a) {
		if p := q.packet(a.m.src); relays && p.Dst.Port() == 53 {
			r.question(r.ctlW, &p, r.now())
			continue
		}
		r.count.Refused.Add(1)
		r.ctlW.Refuse(q.packet(a.m.src), why)
	}
}

// again opens a after a delay that grows with its failures. Without failures it opens a at once, unless it was opened
// just before.
func (r *shard) again(a *assoc) {
	d := time.Duration(0)
	if a.opened > 0 {
		d = max(0, time.Duration(a.opened-r.now())+reopenFloor)
	}
	if a.failures > 0 {
		d = min(r.retryFirst<<min(a.failures-1, 16), r.retryMax)
		d += time.Duration(rand.Int64N(int64(d)/4 + 1)) // so that not all mappings try at the same moment
	}
	if d == 0 {
		r.ctl.post(event{kind: evOpen, a: a})
		return
	}
	time.AfterFunc(d, func() { r.ctl.post(event{kind: evOpen, a: a}) })
}

// watchUpstreams makes the associations of p's upstreams open at once when a server works again.
func (r *Router) watchUpstreams(p *policy) {
	for _, up := range p.order {
		if u, ok := up.Upstream.(interface{ OnUp(func()) }); ok {
			u.OnUp(func() { r.ctl.post(event{kind: evBack, up: up}) })
		}
	}
}

// back opens the associations that wait for their next try, which may be half a minute away.
func (r *shard) back(up *upstream) {
	var waiting []*assoc
	r.udp.mu.Lock()
	up.refuseUntil.Store(0)
	for _, m := range r.udp.all {
		if a := m.assocOf(up); a != nil && a.link == nil && a.try == nil {
			a.failures = 0
			waiting = append(waiting, a)
		}
	}
	r.udp.mu.Unlock()
	for _, a := range waiting {
		r.open(a)
	}
}

// closed handles the failure of an open link. The mapping stays, and so does what the app knows.
func (r *shard) closed(e event) {
	t, a := e.t, e.t.a
	if t.closed {
		return
	}
	t.closed, t.why = true, e.err
	if t.why == nil {
		t.why = errors.New("the control connection ended")
	}
	r.udp.mu.Lock()
	if a.try != t || a.link == nil { // not wanted, or done was not called yet
		r.udp.mu.Unlock()
		return
	}
	link := a.link
	a.link, a.try = nil, nil
	r.endedOnName(a, t.why)
	lived := time.Duration(r.now() - a.opened)
	switch {
	case link.Stats().Received > 0, lived >= r.livedLong:
		a.failures = 0
	default:
		a.failures++
		if lived < r.quickEnd && !a.up.heard.Load() {
			a.up.deaf.Add(1)
		}
	}
	r.count.Reassociations.Add(1)
	a.up.count.Reassociations.Add(1)
	if a.failures > 0 && a.up.deaf.Load() >= deafAfter {
		r.refuseUDP(a, flow.RefusePort, errEndsAssociations)
	} else {
		r.again(a)
	}
	r.udp.mu.Unlock()
	t.cancel()
	r.closeLink(a.up, link)
	r.log.post(
		slog.LevelDebug,
		"association is made again",
		slog.Uint64("flow", a.m.id),
		slog.String("upstream", a.up.name),
		slog.Any("err", t.why),
	)
}

// sweep checks a part of the mappings and ends those whose time is over.
func (r *shard) sweep() {
	t := &r.udp
	now := r.now()
	var old []*mapping
	var deaf []*assoc
	t.mu.Lock()
	for range min(max(sweepMin, len(t.all)/sweepPart), len(t.all)) {
		if t.walk >= len(t.all) {
			t.walk = 0
		}
		m := t.all[t.walk]
		t.walk++
		if now >= m.notYet && r.idle(m, now) {
			old = append(old, m)
		}
		deaf = appendDeaf(deaf, m)
	}
	for _, a := range deaf {
		r.refuseUDP(a, flow.RefusePort, errNobodyListens)
	}
	t.mu.Unlock()
	for _, m := range old {
		exists := r.exists(m)
		t.mu.Lock()
		switch {
		case m.gone.Load() || !r.idle(m, r.now()): // ended, or a datagram came during the query
		case exists:
			m.notYet = r.now() + int64(t.pinned)
		default:
			r.count.MappingsExpired.Add(1)
			r.endMapping(m, "closed", nil)
		}
		t.mu.Unlock()
	}
}

// exists asks whether the app has a socket with m's endpoint. It returns false if that cannot be queried.
func (r *Router) exists(m *mapping) bool {
	if r.cfg.Sockets == nil {
		return false
	}
	ok, err := r.cfg.Sockets.Exists(flow.UDP, m.src, noAddr)
	return ok && err == nil
}

// unreachable ends m if its socket is gone, as the app's kernel reported.
func (r *shard) unreachable(m *mapping) {
	if r.exists(m) {
		return // it is connected, and another sender wrote to it
	}
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	if !m.gone.Load() {
		r.endMapping(m, "unreachable", errUnreachable)
	}
}

// idle reports whether m has been silent for its lifetime. The caller holds udp.mu.
func (r *shard) idle(m *mapping, now int64) bool {
	life := r.udp.life
	// An exchange of one datagram in each direction is also over, because no more is expected.
	if m.oneShot || m.upPkts == 1 && m.downPkts.Load() >= 1 {
		life = r.udp.shortLife
	}
	return now-m.lastSeen() >= int64(life)
}
