package route

import (
	"bytes"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// SOCKS does not carry ICMP. If the user wants it, an echo request is answered from the outcome of a TCP connection to the
// same address, which the rules give to an upstream as they would give it a program's connection. A destination that grants
// or refuses the connection is there. The connection is closed at once.

const (
	echoWait    = 4 * time.Second // for each port; ping(8) waits for 10 seconds
	echoKeep    = time.Second     // how long an outcome is valid
	echoDials   = 64              // destinations that are being asked at the same time
	echoDests   = 1024            // destinations whose outcome is kept, and those being asked
	echoWaiting = 64              // requests that wait for one destination
	echoBytes   = 4 << 20         // of all requests that wait
	echoRate    = 1000            // requests in a second
	echoDialing = 100             // destinations that are asked in a second
)

// echoKey identifies a destination as one app sees it: rules may depend on the app's address.
type echoKey struct{ src, dst netip.Addr }

// echoes is what is known and being asked about the destinations of echo requests.
type echoes struct {
	ports atomic.Pointer[[]uint16] // to connect to, in this order; nil: echo requests are not taken
	wait  time.Duration
	wg    sync.WaitGroup // one for each destination that is being asked

	mu      sync.Mutex
	dests   map[echoKey]*echoDest
	pending int   // destinations that are being asked
	bytes   int   // of all requests that wait
	second  int64 // for which the next two count
	taken   int
	asked   int
	closing bool
}

// echoDest is one destination.
type echoDest struct {
	r     *shard
	key   echoKey
	ports []uint16

	// The fields below belong to whoever makes the dials, one after the other.
	refused bool
	why     flow.Refusal // the first unreachable, if refused

	// The fields below are guarded by echoes.mu.
	waiting []flow.Echo // with packets of their own
	call    *loop.Call  // the dial
	outcome echoOutcome
	until   int64 // the end of outcome's validity; 0: there is no outcome yet
}

// echoOutcome is what is known about a destination.
type echoOutcome struct {
	there bool
	why   flow.Refusal // if it is not there; RefuseSilent: nothing is known
}

// SetPing sets the ports by which echo requests are answered; none: they are not. It may be called from any goroutine.
func (r *Router) SetPing(ports []uint16) {
	if len(ports) == 0 {
		r.echo.ports.Store(nil)
		return
	}
	r.echo.ports.Store(&ports)
}

// HandleEcho implements stack.EchoHandler. It does not block.
func (r *Router) HandleEcho(shard int, e flow.Echo) bool {
	ports := r.echo.ports.Load()
	if ports == nil {
		return false
	}
	s := r.shards[shard]
	s.count.Echoes.Add(1)
	d, known, ok := r.echo.take(s, e, *ports)
	switch {
	case !ok:
		s.count.EchoesLimited.Add(1)
	case known:
		s.answerEcho(e, d.outcome)
	case d != nil:
		d.try(0)
	}
	return true
}

// take lets a request wait for the outcome of its destination. known means that d has it already. If neither d nor known is
// set, somebody else asks the destination. ok is false if the request exceeds a limit.
func (t *echoes) take(s *shard, e flow.Echo, ports []uint16) (d *echoDest, known, ok bool) {
	now := s.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if sec := now / int64(time.Second); sec != t.second {
		t.second, t.taken, t.asked = sec, 0, 0
	}
	if t.taken++; t.closing || t.taken > echoRate {
		return nil, false, false
	}
	key := echoKey{e.Src, e.Dst}
	d = t.dests[key]
	if d != nil && d.until != 0 {
		if now < d.until {
			return d, true, true
		}
		delete(t.dests, key)
		d = nil
	}
	if t.bytes+len(e.Packet) > echoBytes || d != nil && len(d.waiting) >= echoWaiting {
		return nil, false, false
	}
	isNew := d == nil
	if isNew {
		if d = t.add(s, key, now); d == nil {
			return nil, false, false
		}
		d.ports = ports
	}
	e.Packet = bytes.Clone(e.Packet)
	d.waiting = append(d.waiting, e)
	t.bytes += len(e.Packet)
	if !isNew {
		d = nil
	}
	return d, false, true
}

// add makes the entry of a destination that will be asked, or returns nil if there are too many. mu is held.
func (t *echoes) add(s *shard, key echoKey, now int64) *echoDest {
	if t.pending >= echoDials || t.asked >= echoDialing {
		return nil
	}
	if len(t.dests) >= echoDests {
		for k, d := range t.dests {
			if d.until != 0 && now >= d.until {
				delete(t.dests, k)
			}
		}
		if len(t.dests) >= echoDests {
			return nil
		}
	}
	if t.dests == nil {
		t.dests = make(map[echoKey]*echoDest)
	}
	d := &echoDest{r: s, key: key}
	t.dests[key] = d
	t.pending++
	t.asked++
	t.wg.Add(1)
	return d
}

// try asks the destination by its port number i, or by the next one whose verdict allows it.
func (d *echoDest) try(i int) {
	for ; i < len(d.ports); i++ {
		dest := Dest{Addr: netip.AddrPortFrom(d.key.dst, d.ports[i]), Src: d.key.src}
		v := d.decide(&dest)
		switch v.kind {
		case carry:
			v.hit(d.r.index, 1)
			d.dial(i, v, dest)
			return
		case reject:
			v.hit(d.r.index, 1)
			d.unreachable(flow.RefuseAdmin)
		case drop:
			v.hit(d.r.index, 1)
		case impossible:
			why := flow.RefuseNet
			if p := d.r.cfg.Pool; p != nil && p.Contains(d.key.dst) {
				why = flow.RefuseHost // errNoName
			}
			d.unreachable(why)
		}
	}
	if d.refused {
		d.finish(echoOutcome{why: d.why})
	} else {
		d.finish(echoOutcome{why: flow.RefuseSilent})
	}
}

// decide makes the verdict as for a TCP flow. The owner of a request's socket is not known. If the verdict depends on it, the
// request must not leave by another way than the owner's connections, and the verdict stays verdictAsk.
func (d *echoDest) decide(dest *Dest) *verdict {
	r := d.r
	if r.host.isHost(d.key.dst) {
		dest.Sniffed = HostServiceName
	} else if p := r.cfg.Pool; p != nil && p.Contains(d.key.dst) {
		name, ok := p.AppendName(nil, d.key.dst)
		if !ok {
			return verdictImpossible
		}
		dest.Name = string(name)
	}
	f := flow.Flow{Proto: flow.TCP, Src: netip.AddrPortFrom(d.key.src, 0), Dst: dest.Addr, Start: time.Now()}
	q := r.queryOf(f, *dest)
	v := r.verdictOn(&q)
	if v.kind == carry || v.kind == reject || v.kind == drop {
		r.decisions.post(decision{f.Start, f, q.names, v, nil})
	}
	return v
}

// dial connects to port number i.
func (d *echoDest) dial(i int, v *verdict, dest Dest) {
	t := &d.r.echo
	call := new(loop.Call)
	t.mu.Lock()
	d.call = call
	closing := t.closing
	t.mu.Unlock()
	if closing {
		d.finish(echoOutcome{why: flow.RefuseSilent})
		return
	}
	d.r.count.EchoDials.Add(1)
	late := time.AfterFunc(t.wait, call.Cancel)
	l := d.r.loops[i%len(d.r.loops)]
	v.up.DialStream(call, l, dest, func(sock loop.Socket, err error) {
		late.Stop()
		if err == nil {
			sock.Close()
		}
		switch o := echoOutcomeOf(err); {
		case o.there:
			d.finish(o)
			return
		case o.why != flow.RefuseSilent:
			d.unreachable(o.why)
		}
		d.try(i + 1)
	})
}

func (d *echoDest) unreachable(why flow.Refusal) {
	if !d.refused {
		d.refused, d.why = true, why
	}
}

// echoOutcomeOf returns what a dial that ended with err shows about its destination. Only what the destination, or a server
// in its name, has answered is taken for the truth: a failure of the proxy says nothing about the destination.
func echoOutcomeOf(err error) echoOutcome {
	var reply socks.Reply
	var errno syscall.Errno
	silent := echoOutcome{why: flow.RefuseSilent}
	switch {
	case err == nil:
		return echoOutcome{there: true}
	case isServerFault(err), errors.Is(err, socks.ErrLate):
		return silent
	case errors.As(err, &reply):
		switch reply.Plain() {
		case socks.ReplyRefused:
			return echoOutcome{there: true}
		case socks.ReplyNotAllowed, socks.ReplyNetUnreachable, socks.ReplyHostUnreachable:
			return echoOutcome{why: refusalOfReply(reply)}
		}
	case errors.As(err, &errno):
		switch errno {
		case syscall.ECONNREFUSED:
			return echoOutcome{there: true}
		case syscall.ENETUNREACH, syscall.EHOSTUNREACH:
			return echoOutcome{why: refusalOf(err)}
		}
	}
	return silent
}

// finish answers what waits for the destination, and keeps the outcome for a while.
func (d *echoDest) finish(o echoOutcome) {
	t := &d.r.echo
	t.mu.Lock()
	waiting := d.waiting
	d.waiting, d.call, d.outcome = nil, nil, o
	d.until = d.r.now() + int64(echoKeep)
	t.pending--
	for _, e := range waiting {
		t.bytes -= len(e.Packet)
	}
	t.mu.Unlock()
	for _, e := range waiting {
		d.r.answerEcho(e, o)
	}
	t.wg.Done()
}

// answerEcho answers one request.
func (r *shard) answerEcho(e flow.Echo, o echoOutcome) {
	switch {
	case o.there:
		r.count.EchoReplies.Add(1)
		e.By.ReplyEcho(e.Packet)
	case o.why == flow.RefuseSilent:
		r.count.EchoesSilent.Add(1)
	default:
		r.count.EchoesRefused.Add(1)
		e.By.RefuseEcho(e.Packet, o.why)
	}
}

// close ends the dials and refuses further requests.
func (t *echoes) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closing = true
	for _, d := range t.dests {
		if d.call != nil {
			d.call.Cancel()
		}
	}
}
