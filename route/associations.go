package route

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/flow"
)

// The life of an association:
//
//	opening  -> open      the upstream returned a link; what was queued is sent
//	opening  -> retrying  the upstream returned an error; after a delay: opening
//	opening  -> (removed) the server does not carry UDP
//	open     -> opening   the control connection ended; at once if it had lived long enough, otherwise through retrying
//
// In opening and retrying datagrams are queued; from the third consecutive failure on they are refused.
type assoc struct {
	m        *mapping
	up       *upstream
	loop     int
	link     relay.PacketLink // not nil: open
	try      *try             // the pending one, or the one that returned link
	opened   int64
	failures int
	// unreachable is how many of the link's ICMP errors up.unreachable includes.
	unreachable uint64
	queue       queue
	names       *nameTaking // of the server; nil: it is not open, or no server
	namedAt     int64       // when something was last sent to a name, if nothing has come back since; 0: there is no such time
	namedTo     string
	probe       atomic.Pointer[probe] // takes the answers to its own questions out of what arrives; nil: there is none
}

// try is one call of OpenPackets. It distinguishes the results of an earlier call from those that are wanted.
type try struct {
	a      *assoc
	cancel context.CancelFunc
	closed bool // closed was called, and why; the upstream may call it before done
	why    error
}

// refuseAfter is the number of consecutive failures from which on datagrams are refused instead of queued.
const refuseAfter = 3

const (
	retryFirst = 250 * time.Millisecond
	retryMax   = 30 * time.Second
	livedLong  = 10 * time.Second // an association that lived this long is made again at once
)

// Some servers end an association if one datagram cannot be sent (sing-box, trojan). An association that has
// delivered an answer is made again at once, but not more often than this.
const reopenFloor = 100 * time.Millisecond

// associations opens and closes the associations of all shards. It belongs to Run, except the number of mappings.
type associations struct {
	*base
	mappings atomic.Int64 // number of mappings of all shards; any goroutine may change it

	opening int      // tries whose done was not called yet
	waiting []*assoc // until opening falls below the limit
	tooLong bool     // a warning about datagrams that are too large was logged
}

func (t *associations) closeLink(up *upstream, l relay.PacketLink) {
	overflowed := l.Overflowed()
	_ = l.Close() // nothing can be done about an error of a link that is given up
	s := l.Stats()
	s.Overflowed = overflowed
	count.Add(&up.count.links, &s)
	if s.TooLarge > 0 && !t.tooLong {
		t.tooLong = true
		t.log.post(
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
	if r.assocs.opening >= r.cfg.Limits.Associations {
		most := r.udp.most
		r.udp.mu.Unlock()
		if r.assocs.waiting = append(r.assocs.waiting, a); len(r.assocs.waiting) > 2*most {
			r.assocs.waiting = slices.DeleteFunc(r.assocs.waiting, func(a *assoc) bool { return a.m.gone.Load() })
		}
		return
	}
	ctx, cancel := context.WithCancel(r.ctx)
	t := &try{a: a, cancel: cancel}
	a.try = t
	r.udp.dialing++
	r.udp.mu.Unlock()
	r.assocs.opening++
	m, w := a.m, r.loopW[a.loop]
	a.up.OpenPackets(socks.WithSource(ctx, m.src.Addr()), r.loops[a.loop],
		func(pkts []flow.Packet) {
			if !a.up.heard.Load() {
				a.up.heardUDP(r.Router)
			}
			r.deliver(a, w, pkts)
		},
		func(l relay.PacketLink, err error) { r.inbox.post(event{kind: evDone, t: t, link: l, err: err}) },
		func(err error) { r.inbox.post(event{kind: evClosed, t: t, err: err}) })
}

// next starts waiting tries while the limit allows.
func (t *associations) next() {
	for len(t.waiting) > 0 && t.opening < t.cfg.Limits.Associations {
		a := t.waiting[0]
		t.waiting = t.waiting[1:]
		a.m.s.open(a)
	}
}

func (r *shard) opened(e event) {
	t, a := e.t, e.t.a
	r.assocs.opening--
	defer r.assocs.next()
	if e.err == nil && t.closed {
		r.assocs.closeLink(a.up, e.link)
		e.link, e.err = nil, t.why
	}
	r.udp.mu.Lock()
	if a.try != t { // no longer wanted
		r.udp.mu.Unlock()
		t.cancel()
		if e.link != nil {
			r.assocs.closeLink(a.up, e.link)
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
	r.lookKept(a.m)
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
			r.unsent(r.runW, t, err)
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
	relays := r.port53.relays() && a.failures < refuseAfter
	for _, q := range r.udp.take(a) {
		if p := q.packet(a.m.src); relays && p.Dst.Port() == 53 {
			r.question(r.runW, &p, r.now())
			continue
		}
		r.count.Refused.Add(1)
		r.runW.Refuse(q.packet(a.m.src), why)
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
		r.inbox.post(event{kind: evOpen, a: a})
		return
	}
	time.AfterFunc(d, func() { r.inbox.post(event{kind: evOpen, a: a}) })
}

// watchUpstreams makes the associations of p's upstreams open at once when a server works again.
func (r *Router) watchUpstreams(p *policy) {
	for _, up := range p.order {
		if u, ok := up.Upstream.(interface{ OnUp(func()) }); ok {
			u.OnUp(func() { r.inbox.post(event{kind: evBack, up: up}) })
		}
	}
}

// back opens the associations that wait for their next try, which may be half a minute away.
func (r *shard) back(up *upstream) {
	var waiting []*assoc
	r.udp.mu.Lock()
	up.refuseUntil.Store(0)
	up.unreachable.Store(0) // they were about the relays of a server that has gone
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
	a.deafNow()
	a.link, a.try, a.unreachable = nil, nil, 0
	r.endedOnName(a, t.why)
	r.lookKept(a.m)
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
	r.assocs.closeLink(a.up, link)
	r.log.post(
		slog.LevelDebug,
		"association is made again",
		slog.Uint64("flow", a.m.id),
		slog.String("upstream", a.up.name),
		slog.Any("err", t.why),
	)
}

// discard ends an association whose mapping is gone or no longer needs it. The caller holds udp.mu.
func (r *shard) discard(a *assoc) {
	r.load[a.loop].Add(-1)
	if lost := r.udp.take(a); len(lost) > 0 {
		r.count.Dropped.Add(uint64(len(lost)))
	}
	if a.try != nil && a.link == nil {
		r.udp.dialing--
	}
	r.inbox.post(event{kind: evDiscard, up: a.up, link: a.link, t: a.try})
	a.deafNow()
	a.link, a.try, a.unreachable = nil, nil, 0
}
