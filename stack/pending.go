package stack

import (
	"cmp"
	"container/heap"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// DefaultPending and DefaultPendingPerDest are the defaults of Limits. A swarm's dead peers wait for the proxy's timeout,
	// 30 s by default: 8192 of them are 270 new ones each second. A program that opens more than 256 connections to one
	// address at once is a scanner.
	DefaultPending        = 8192
	DefaultPendingPerDest = 256

	// synRTO is the first retransmission timeout of a SYN (RFC 6298 2.1; Linux TCP_TIMEOUT_INIT).
	synRTO = time.Second
	// maxGap is the longest gap between two SYNs (Linux TCP_RTO_MAX).
	maxGap = 120 * time.Second
	// askSlack is what a retransmission may be late before the app's kernel is asked.
	askSlack = 250 * time.Millisecond
	// askEvery is how often it is asked after that, and the longest that a dead app keeps its dial.
	askEvery = 4 * time.Second
	// lookAfter is when a handshake is first looked at after a RST, and doubled for each of the lookTimes looks: gVisor decides
	// in microseconds, unless the machine is very busy.
	lookAfter = time.Millisecond
	lookTimes = 8
	// openTime bounds a handshake: the app's kernel answers a SYN-ACK at once, unless the TUN lost it.
	openTime = 30 * time.Second
)

// tuple names a connection from the app's side.
type tuple struct{ src, dst netip.AddrPort }

// synState is what became of a SYN.
//
//	              SYN                    Accept                     handshake over
//	(no entry) ----------> waiting ------------------> opening --------------------> (no entry, Opened)
//	     ^                  |    |                        |
//	     |   RST, another   |    | Reject                 | 30 s: the endpoint is aborted, Opened(nil, err)
//	     +------ ISN, ------+    +-----> refused          v
//	     |   app gone            |       (the answer is given again to the same SYN)
//	     |  (OnCancel)           +-----> silent
//	     |                               (the same SYN is swallowed)
//	     +-- no SYN for twice the last gap and a second, or another ISN --+
//
// waiting counts against the budgets, the others don't; refused and silent keep no packet.
type synState uint8

const (
	synWaiting   synState = iota
	synOpening            // Accept won: gVisor shakes hands
	synRefused            // Reject won, with an answer
	synSilent             // Reject won, with silence: a tombstone
	synCancelled          // the app gave up; not in the table
	synDone               // not in the table
)

// pendingSYN is one SYN from its arrival to the end of its retransmissions. It is the flow.StreamRequest that the handler
// holds. All fields but the first four are guarded by the table's lock.
type pendingSYN struct {
	t     *pendingTable
	key   tuple
	isn   uint32
	start time.Time

	state    synState
	why      flow.Refusal         // refused
	pkt      *gstack.PacketBuffer // waiting: the latest SYN, ours
	onCancel func()               // waiting
	listener flow.Listener        // opening
	openBy   time.Time            // opening: when it has taken too long
	looks    int                  // opening: how often the timer looked since the last RST
	made     bool                 // opening: gVisor had an endpoint when the RST came
	last     time.Time            // when the latest SYN came
	gap      time.Duration        // between the last two SYNs, or synRTO
	due      time.Time            // when the timer looks at it
	index    int                  // in the heap
}

// pendingTable keeps the SYNs that are not connections. One lock, one timer, no goroutine for any of them. It is
// called by the frame reader (syn, rst) and by whoever holds a request.
type pendingTable struct {
	limits  Limits
	budget  *budget // of all shards
	sockets flow.Sockets
	stats   *counters

	// What the stack does for the table. Called without the lock.
	open   func(*pendingSYN, *gstack.PacketBuffer) // takes over the packet, and calls take in the end
	abort  func(tuple)                             // ends a handshake that is still under way
	shake  func(tuple) shakeState                  // says how far a handshake is
	answer func(syn []byte, why flow.Refusal)      // writes RST or ICMP; syn: the IP and TCP headers

	mu      sync.Mutex
	byKey   map[tuple]*pendingSYN
	waiting int
	shakes  int // of byKey: opening
	peak    int // of byKey since it was made
	heap    dueHeap
	timer   *time.Timer
	firing  bool
	idle    sync.Cond // firing became false
	refuse  bool      // every new SYN is answered with RST
	closed  bool

	shaking sync.WaitGroup // handshakes: Done when the listener was told how it ended
}

// Set changes Limits and KeepaliveIdle for what begins from now on. As in Config, zero means the default.
func (s *Stack) Set(l Limits, keepaliveIdle time.Duration) {
	s.keepalive.Store(int64(cmp.Or(keepaliveIdle, DefaultKeepalive)))
	for _, p := range s.shards {
		p.pending.mu.Lock()
		p.pending.limits = l.withDefaults()
		p.pending.mu.Unlock()
	}
}

func newPendingTable(l Limits, b *budget, sockets flow.Sockets, stats *counters) *pendingTable {
	t := &pendingTable{
		limits: l.withDefaults(), budget: b, sockets: sockets, stats: stats,
		byKey: make(map[tuple]*pendingSYN),
	}
	t.idle.L = &t.mu
	t.timer = time.AfterFunc(time.Hour, t.fire)
	t.timer.Stop()
	return t
}

// syn takes a SYN. It returns a request when one is to be handed on: the SYN is new, and within the budgets. pkt stays the
// caller's.
func (t *pendingTable) syn(key tuple, isn uint32, pkt *gstack.PacketBuffer) *pendingSYN {
	now := time.Now()
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	e := t.byKey[key]
	if e != nil && (e.isn == isn || e.state == synOpening) {
		why, again := t.again(e, isn, pkt, now)
		if e.state == synOpening {
			// gVisor will have its endpoint in a moment, or the handshake has failed. Another ISN comes again after that.
			t.lookSoon(e, now)
		}
		t.mu.Unlock()
		if again {
			t.answer(synHeaders(pkt), why)
		}
		return nil
	}
	var cancel func()
	if e != nil {
		if e.state == synWaiting {
			t.stats.replaced.Add(1)
			cancel = t.cancel(e)
		} else {
			t.drop(e, synDone)
		}
	}
	refuse := t.refuse
	var req *pendingSYN
	over := within
	if !refuse {
		over = t.budget.take(key.dst.Addr(), t.limits)
	}
	switch {
	case refuse:
	case over == spentAll:
		t.stats.overBudget.Add(1)
	case over == spentDest:
		t.stats.overDestBudget.Add(1)
	default:
		req = &pendingSYN{t: t, key: key, isn: isn, start: now, last: now, gap: synRTO, pkt: pkt.Clone(), index: -1}
		t.byKey[key] = req
		t.peak = max(t.peak, len(t.byKey))
		t.waiting++
		t.stats.syns.Add(1)
		t.stats.pending.Add(1)
		t.schedule(req, t.askAt(req))
	}
	t.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	if refuse {
		t.answer(synHeaders(pkt), flow.RefuseReset)
	}
	return req
}

// again notes another SYN for e, and says whether it is to be answered once more.
func (t *pendingTable) again(e *pendingSYN, isn uint32, pkt *gstack.PacketBuffer, now time.Time) (flow.Refusal, bool) {
	if e.isn != isn {
		return 0, false
	}
	t.stats.retransmits.Add(1)
	e.gap = min(max(now.Sub(e.last), synRTO), maxGap)
	e.last = now
	switch e.state {
	case synWaiting:
		// The newest timestamp: what SYN-ACK echoes is then the shortest round trip that is true.
		e.pkt.DecRef()
		e.pkt = pkt.Clone()
		t.schedule(e, t.askAt(e))
	case synRefused, synSilent:
		t.schedule(e, e.over())
	}
	return e.why, e.state == synRefused
}

// rst takes a RST, and reports whether it was for a SYN that waits.
func (t *pendingTable) rst(key tuple, seq uint32) bool {
	t.mu.Lock()
	e := t.byKey[key]
	// The sequence number is that of the SYN or, with it counted and data of TCP Fast Open, a little more.
	if e == nil || e.state != synWaiting || seq-e.isn > 1<<16 {
		t.mu.Unlock()
		return false
	}
	t.stats.cancelled.Add(1)
	cancel := t.cancel(e)
	t.mu.Unlock()
	cancel()
	return true
}

// over is when e's SYN is surely not sent again.
func (e *pendingSYN) over() time.Time { return e.last.Add(2*e.gap + synRTO) }

// askAt is when the app's kernel is asked whether the socket is there: at the first missed retransmission. Linux sends
// four in steps of a second and doubles the gap only then (tcp_syn_linear_timeouts), so twice the last gap is the
// latest. Where nobody can be asked it is when the SYN is over.
func (t *pendingTable) askAt(e *pendingSYN) time.Time {
	if t.sockets == nil {
		return e.over()
	}
	next := synRTO
	if !e.last.Equal(e.start) {
		next = 2 * e.gap
	}
	return e.last.Add(min(next+askSlack, askEvery))
}

// The rest is called with the lock held, unless it says otherwise.

// leave ends e's waiting: its budget and its packet are free.
func (t *pendingTable) leave(e *pendingSYN) {
	t.waiting--
	t.stats.pending.Add(-1)
	t.budget.give(e.key.dst.Addr())
	if e.pkt != nil {
		e.pkt.DecRef()
		e.pkt = nil
	}
}

// drop takes e out of the table.
func (t *pendingTable) drop(e *pendingSYN, s synState) {
	switch e.state {
	case synWaiting:
		t.leave(e)
	case synOpening:
		t.shakes--
	}
	e.state = s
	t.remove(e)
}

// remove takes e out of the table. What a burst made is given back when little of it is left: a map never shrinks.
func (t *pendingTable) remove(e *pendingSYN) {
	delete(t.byKey, e.key)
	if e.index >= 0 {
		heap.Remove(&t.heap, e.index)
	}
	if t.peak > remake && len(t.byKey) <= t.peak/8 {
		t.byKey, t.heap = maps.Collect(maps.All(t.byKey)), slices.Clone(t.heap)
		t.peak = len(t.byKey)
	}
}

// remake is from how many entries on a table is made anew when an eighth is left.
const remake = 1000

// cancel drops e, and returns what is to be called without the lock.
func (t *pendingTable) cancel(e *pendingSYN) func() {
	t.drop(e, synCancelled)
	f := e.onCancel
	e.onCancel = nil
	if f == nil {
		f = func() {}
	}
	return f
}

// schedule sets when the timer looks at e.
func (t *pendingTable) schedule(e *pendingSYN, due time.Time) {
	e.due = due
	if e.index < 0 {
		heap.Push(&t.heap, e)
	} else {
		heap.Fix(&t.heap, e.index)
	}
	if t.heap[0] == e {
		t.arm()
	}
}

func (t *pendingTable) arm() {
	if len(t.heap) != 0 && !t.firing && !t.closed {
		t.timer.Reset(time.Until(t.heap[0].due))
	}
}

// dueHeap is a heap of entries by due.
type dueHeap []*pendingSYN

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *dueHeap) Push(x any) {
	e := x.(*pendingSYN)
	e.index = len(*h)
	*h = append(*h, e)
}
func (h *dueHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	e.index = -1
	return e
}
