package route

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// streams is the flow table of TCP: the pending and open flows. A refused flow leaves only its log line.
type streams struct {
	mu      sync.Mutex
	all     []*stream
	walk    int            // where the next step starts
	closing atomic.Bool    // set under mu, so that add either comes first or sees it
	wg      sync.WaitGroup // one for each entry
}

// allStreams is what the TCP flows of all shards have in common.
type allStreams struct {
	live   atomic.Int64 // number of flows
	sniffs sniffs
	ftp    activeFTP
}

// remake is the size from which on a table is replaced when an eighth is left.
const remake = 1000

// The life of a stream. Each arrow happens once, and over is final:
//
//	dialing -> open    the upstream granted it; the relay has the request and the socket
//	dialing -> over    refused, or the app gave up, or we end
//	open    -> over    the relay's Result
const (
	dialing int32 = iota
	open
	over
)

var streamStates = [...]string{dialing: "dialing", open: "open", over: "closed"}

// stream is a TCP flow for which an upstream was asked.
type stream struct {
	r        *shard
	req      flow.StreamRequest // nil after it was answered
	flow     flow.Flow
	dest     Dest
	lease    dns.Lease // of the fake address, if dest has a name
	v        *verdict
	call     loop.Call    // the dial
	gone     atomic.Bool  // the app gave up
	replaced atomic.Bool  // its upstream is no longer configured
	state    atomic.Int32 // dialing, open, over
	loop     int
	relay    atomic.Pointer[relay.Relay]
	index    int         // index in streams.all
	known    atomic.Bool // "not found" means that the app's socket is gone
	owner    *flow.Owner // the owner that the verdict is based on; nil: it needed none
	second   atomic.Pointer[secondTry]

	// The fields below belong to Run, for its checks of the socket.
	moved    uint64 // bytes at the last check
	orphaned bool
}

var verdictImpossible = &verdict{kind: impossible, rule: "none"}

// handleStream implements HandleStream for one shard.
func (r *shard) handleStream(req flow.StreamRequest) {
	f := req.Flow()
	f.ID = r.ids.Add(1)
	if f.Start.IsZero() {
		f.Start = time.Now()
	}
	r.count.Streams.Add(1)
	dest := Dest{Addr: f.Dst, Src: f.Src.Addr(), SrcPort: f.Src.Port()}
	if r.cfg.ComesBack != nil && r.cfg.ComesBack(f) {
		r.turnAway(req, f, dest, verdictImpossible, flow.RefuseReset, "refused", errComesBack)
		return
	}
	if r.cfg.OwnPort != nil && r.cfg.OwnPort(f.Dst) {
		r.turnAway(req, f, dest, verdictImpossible, flow.RefuseReset, "refused", errOwnPort)
		return
	}
	if u := r.upnp.Load(); u != nil && f.Dst == gatewayWeb {
		if r.cfg.Asks != nil && !r.cfg.Asks(f.Src.Addr()) {
			r.turnAway(req, f, dest, u.verdict, flow.RefuseReset, "refused", errMayNotAsk)
			return
		}
		r.takeStream(req, f, dest, u.verdict, nil)
		return
	}
	if d := r.port53.server.Load(); d != nil && f.Dst.Port() == 53 && flow.OneHost(f.Dst.Addr()) {
		p := r.policy.Load()
		to, carried := d.Carries()
		relayed := d.Relays() && flow.CanBePeer(f.Dst.Addr())
		// A connection whose questions need not be examined is carried unchanged, including zone transfers.
		carried = (carried || relayed) && !p.fake && !p.guard && len(p.split.Zones) == 0 && r.host == nil
		if !carried {
			r.takeStream(req, f, dest, r.port53.answer, nil)
			return
		}
		if !relayed {
			// A truncated answer asks the app to retry by TCP, and the address in resolv.conf need not exist.
			dest = resolverDest(to)
			dest.Src = f.Src.Addr()
			v := p.decideResolver(to)
			r.takeStream(req, f, dest, v, &query{})
			return
		}
	}
	if r.host.isHost(f.Dst.Addr()) {
		dest.Sniffed = HostServiceName
	} else if p := r.cfg.Pool; p != nil && p.Contains(f.Dst.Addr()) {
		name, ok := p.AppendName(nil, f.Dst.Addr())
		if !ok {
			r.turnAway(req, f, dest, verdictImpossible, flow.RefuseHost, "refused", errNoName)
			return
		}
		dest.Name = string(name)
	}
	r.judge(req, f, dest)
}

// judge makes the verdict on a flow, or leaves it to the asker, or to what the app's first bytes reveal. It may be
// called from any goroutine.
func (r *shard) judge(req flow.StreamRequest, f flow.Flow, dest Dest) {
	q := r.queryOf(f, dest)
	v := r.verdictOn(&q)
	switch {
	case r.asker == nil && v == verdictAsk: // the owner cannot be found
		q.owner = &nobody
		v = r.verdictOn(&q)
	case r.asker == nil:
	case v == verdictAsk || v.apart() || r.decisions != nil: // the decision line names the program
		if r.asker.post(waiting{r, req, f, dest}) {
			return
		}
		if v == verdictAsk || v.apart() {
			r.laterStream(req)
			return
		}
	}
	r.sniffOrTake(req, f, dest, v, &q)
}

// takeStream executes the verdict on a flow. q is what the verdict is based on; nil: the decision is not written. It
// may be called from any goroutine.
func (r *shard) takeStream(req flow.StreamRequest, f flow.Flow, dest Dest, v *verdict, q *query) {
	if q != nil {
		r.decisions.post(decision{f.Start, f, q.names, v, q.owner})
	}
	v.hit(r.index, 1)
	switch v.kind {
	case reject:
		r.turnAway(req, f, dest, v, flow.RefuseReset, "rejected", r.whyRejected(v))
		return
	case drop:
		r.turnAway(req, f, dest, v, flow.RefuseSilent, "dropped", nil)
		return
	case impossible:
		r.turnAway(req, f, dest, v, flow.RefuseNet, "refused", errors.New("nothing can be carried to this address"))
		return
	}
	if v.apart() && q != nil {
		dest.Program = programOf(q.owner)
	}
	s := &stream{r: r, req: req, flow: f, dest: dest, v: v, loop: -1}
	if q != nil {
		s.owner = q.owner
	}
	if r.cfg.Pool != nil && dest.Name != "" && dest.Sniffed == "" {
		name, lease, _ := r.cfg.Pool.Hold(f.Dst.Addr())
		if name != dest.Name { // the address was given to another name since the verdict
			lease.Release()
			r.turnAway(req, f, dest, v, flow.RefuseHost, "refused", errNoName)
			return
		}
		s.lease = lease
	}
	if err := r.streams.add(s, &r.tcp.live, r.cfg.Limits.Flows); err != nil {
		s.lease.Release()
		why := flow.RefuseReset
		if err == errFull {
			why = flow.RefuseLater
			r.count.StreamsFull.Add(1)
			r.short(err)
		}
		r.turnAway(req, f, dest, v, why, "refused", err)
		return
	}
	s.loop = r.pickLoop()
	req.OnCancel(s.gaveUp)
	if !r.policy.Load().has(v.up) { // replaced since the verdict, and Reload may not have seen s
		s.replaced.Store(true)
		s.endDial()
	}
	s.event(FlowOpened)
	v.up.DialStream(&s.call, r.loops[s.loop], dest, s.dialed)
}

// turnAway refuses a flow for which no upstream was asked.
func (r *shard) turnAway(req flow.StreamRequest, f flow.Flow, dest Dest, v *verdict, why flow.Refusal, state string, err error) {
	r.count.StreamsRefused.Add(1)
	req.Reject(why)
	i := FlowInfo{Flow: f, Host: dest.host(), Rule: v.rule, State: state}
	if v.up != nil {
		i.Upstream = v.up.name
	}
	r.log.end(i, time.Since(f.Start), err)
	r.watched.send(FlowClosed, i, err)
}

var (
	errFull    = errors.New("too many flows")
	errClosing = errors.New("viasocks is ending")
	// errComesBack means that the flow belongs to a proxy on this host.
	errComesBack = errors.New("a connection of the proxy itself came back to it")
	// errOwnPort means that a program has connected to its own port at the proxy, of which a tracker may have told it.
	errOwnPort = errors.New("the program itself is reached there")
	// errMayNotAsk means that a container has asked for a port; see Config.Asks.
	errMayNotAsk = errors.New("only programs of this host may ask for ports")
	errAppGone   = errors.New("the app gave up")
	// errNoName means that the app kept the address longer than the TTL, or invented it.
	errNoName = errors.New("the fake address no longer stands for a name")
)

// add puts s into the table. all counts the flows of all shards.
func (t *streams) add(s *stream, all *atomic.Int64, limit int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closing.Load():
		return errClosing
	case all.Add(1) > int64(limit):
		all.Add(-1)
		return errFull
	}
	s.index = len(t.all)
	t.all = append(t.all, s)
	t.wg.Add(1)
	return nil
}

func (t *streams) remove(s *stream) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := len(t.all) - 1
	t.all[s.index] = t.all[last]
	t.all[s.index].index = s.index
	t.all[last] = nil
	t.all = t.all[:last]
	if cap(t.all) > remake && last <= cap(t.all)/8 {
		t.all = slices.Clone(t.all)
	}
}

// gaveUp is called by the stack when the app no longer waits for this flow. Locks of the stack may be held.
func (s *stream) gaveUp() {
	s.gone.Store(true)
	s.endDial() // dialed is then called with an error
}

// endDial ends the dial unless it is over. It may be called from any goroutine.
func (s *stream) endDial() {
	s.call.Cancel()
	if t := s.second.Load(); t != nil {
		t.timer.Reset(0) // on its own goroutine, because locks of the stack may be held
	}
}

// dialed handles the upstream's answer, on the loop that will relay, or on any goroutine if there is no socket.
func (s *stream) dialed(sock loop.Socket, err error) {
	s.learnIPv6(err)
	if t := s.second.Load(); t != nil {
		if t.another(err) {
			return
		}
		err = t.over(err)
	} else if s.tryAgain(err) {
		return
	}
	defer func() { s.req = nil }()
	r, up := s.r, s.v.up
	if err == nil {
		up.count.dialed(nil)
	}
	if err != nil {
		s.refused(err)
		return
	}
	up.tcp.works(r.Router, up, "TCP")
	up.dials.grant(time.Since(s.flow.Start))
	if s.gone.Load() {
		sock.Close()
		s.finish("cancelled", 0, 0, errAppGone)
		return
	}
	if s.replaced.Load() {
		sock.Close()
		s.req.Reject(flow.RefuseReset)
		s.finish("aborted", 0, 0, errReplaced)
		return
	}
	if r.cfg.Sockets != nil && r.cfg.Sockets.Forwards() {
		s.look() // the app certainly has its socket now: if it is not found later, it is gone and not a guest's
	}
	if r.streams.closing.Load() {
		sock.Close()
		s.req.Reject(flow.RefuseReset)
		s.finish("aborted", 0, 0, errClosing)
		return
	}
	s.event(FlowDialled)
	s.state.Store(open)
	rel := r.loops[s.loop].Start(s.controlOrNot(s.request()), sock, s.relayed)
	s.relay.Store(rel)
	if r.streams.closing.Load() || s.replaced.Load() { // the Router's own Abort may have come before the relay was visible
		rel.Abort()
	}
}

func (s *stream) refused(err error) {
	r, up := s.r, s.v.up
	up.count.dialed(err)
	switch {
	case s.gone.Load():
		s.finish("cancelled", 0, 0, errAppGone)
		return
	case s.replaced.Load():
		s.req.Reject(flow.RefuseReset)
		s.finish("aborted", 0, 0, errReplaced)
		return
	case isServerFault(err):
		up.tcp.failed(r.Router, up, "TCP", err)
		up.dials.failed.Add(1)
	case r.ctx.Err() != nil:
		s.req.Reject(flow.RefuseReset)
		s.finish("aborted", 0, 0, errClosing)
		return
	case isShortage(err):
		r.short(err)
	default:
		up.tcp.works(r.Router, up, "TCP") // the server has worked even if the target refused
	}
	r.count.StreamsRefused.Add(1)
	why := refusalOf(err)
	s.req.Reject(why)
	state := "refused"
	switch why {
	case flow.RefuseSilent:
		state = "silent"
	case flow.RefuseLater:
		state = "postponed"
	}
	s.finish(state, 0, 0, err)
}

// relayed handles the end of the relay, on its loop.
func (s *stream) relayed(res relay.Result) {
	state := "closed"
	switch {
	case res.Err == nil:
	case errors.Is(res.Err, relay.ErrAppGone):
		state = "cancelled"
	case errors.Is(res.Err, relay.ErrOrphan):
		state = "orphaned"
	case errors.Is(res.Err, relay.ErrAborted), errors.Is(res.Err, relay.ErrClosed):
		state = "aborted"
	default:
		state = "reset"
	}
	s.finish(state, res.Up, res.Down, res.Err)
}

// finish removes s from the table and writes its log line.
func (s *stream) finish(state string, up, down uint64, err error) {
	if s.state.Swap(over) == over {
		return
	}
	r := s.r
	r.count.Up.Add(up) // before it disappears, so that its bytes are never missing
	r.count.Down.Add(down)
	s.v.up.count.Up.Add(up)
	s.v.up.count.Down.Add(down)
	r.streams.remove(s)
	r.tcp.live.Add(-1)
	s.lease.Release()
	if s.loop >= 0 {
		r.load[s.loop].Add(-1)
	}
	r.count.Ended.Add(1)
	i := s.info()
	i.State, i.Up, i.Down = state, up, down
	r.log.end(i, time.Since(s.flow.Start), err)
	r.watched.send(FlowClosed, i, err)
	r.streams.wg.Done()
}

func (s *stream) info() FlowInfo {
	i := FlowInfo{Flow: s.flow, Host: s.dest.host(), Rule: s.v.rule, Upstream: s.v.up.name, State: streamStates[s.state.Load()]}
	if rel := s.relay.Load(); rel != nil {
		i.Up, i.Down = rel.Bytes()
	}
	if s.owner != nil {
		i.PID, i.Exe = s.owner.PID, s.owner.Exe
	}
	return i
}

// pickLoop assigns one more flow to the least loaded loop of the shard.
func (r *shard) pickLoop() int {
	best := 0
	for i := range r.load {
		if r.load[i].Load() < r.load[best].Load() {
			best = i
		}
	}
	r.load[best].Add(1)
	return best
}

// appendTo appends all flows.
func (t *streams) appendTo(all []*stream) []*stream {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append(all, t.all...)
}

// close refuses new flows and resets existing ones. Their ends arrive through dialed and relayed.
func (t *streams) close() {
	t.mu.Lock()
	t.closing.Store(true)
	t.mu.Unlock()
	for _, s := range t.appendTo(nil) {
		s.endDial()
		if rel := s.relay.Load(); rel != nil {
			rel.Abort()
		}
	}
}
