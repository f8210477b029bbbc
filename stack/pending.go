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
	// DefaultPending and DefaultPendingPerDest are the defaults of Limits. The dead peers of a swarm wait for the
	// proxy's timeout, 30 s by default: 8192 of them are 270 new ones each second. A program that opens more than 256
	// connections to one address at once is a scanner.
	DefaultPending        = 8192
	DefaultPendingPerDest = 256

	// synRTO is the first retransmission timeout of a SYN (RFC 6298, section 2.1; TCP_TIMEOUT_INIT of Linux).
	synRTO = time.Second
	// maxGap is the longest gap between two SYNs (TCP_RTO_MAX of Linux).
	maxGap = 120 * time.Second
	// askSlack is how late a retransmission may be before the app's kernel is queried.
	askSlack = 250 * time.Millisecond
	// askEvery is the interval of later queries, and thus the longest time that a dead app keeps its dial.
	askEvery = 4 * time.Second
	// lookAfter is the time after a RST at which a handshake is first checked. It doubles for each of the lookTimes
	// checks; gVisor decides within microseconds unless the machine is very busy.
	lookAfter = time.Millisecond
	lookTimes = 8
	// openTime limits a handshake. The app's kernel answers a SYN-ACK at once unless the TUN lost it.
	openTime = 30 * time.Second
)

// tuple identifies a connection, seen from the app.
type tuple struct{ src, dst netip.AddrPort }

// synState is the state of a SYN.
//
//	              SYN                    Accept                     handshake over
//	(no entry) ----------> waiting ------------------> opening --------------------> (no entry, Opened)
//	     ^                  |    |                        |
//	     |   RST, another   |    | Reject                 | 30 s: the endpoint is aborted, Opened(nil, err)
//	     +------ ISN, ------+    +-----> refused          v
//	     |   app gone            |       (the answer is given again to the same SYN)
//	     |  (OnCancel)           +-----> silent
//	     |                               (the same SYN is ignored)
//	     +-- no SYN for twice the last gap and a second, or another ISN --+
//
// Only waiting counts against the budgets. refused and silent keep no packet.
type synState uint8

const (
	synWaiting   synState = iota
	synOpening            // Accept won: gVisor is doing the handshake
	synRefused            // Reject won, with an answer
	synSilent             // Reject won, with silence: a tombstone
	synCancelled          // the app gave up; not in the table
	synDone               // not in the table
)

// pendingSYN is one SYN from its arrival to the end of its retransmissions. It is the flow.StreamRequest that the
// handler holds. All fields except the first four are guarded by the table's lock.
type pendingSYN struct {
	t     *pendingTable
	key   tuple
	isn   uint32
	start time.Time

	state    synState
	why      flow.Refusal         // refused
	pkt      *gstack.PacketBuffer // waiting: our clone of the latest SYN
	onCancel func()               // waiting
	listener flow.Listener        // opening
	openBy   time.Time            // opening: when it has taken too long
	looks    int                  // opening: how often the timer has checked it since the last RST
	made     bool                 // opening: gVisor had an endpoint when the RST came
	last     time.Time            // when the latest SYN came
	gap      time.Duration        // between the last two SYNs, or synRTO
	due      time.Time            // when the timer will check it
	index    int                  // in the heap
}

// pendingTable holds the SYNs that are not connections yet. It has one lock and one timer, and no goroutine for any
// entry. The frame reader (syn, rst) and the holders of requests call it.
type pendingTable struct {
	limits  Limits
	budget  *budget // shared by all shards
	sockets flow.Sockets
	stats   *counters

	// What the stack does for the table. The functions are called without the lock.
	open   func(*pendingSYN, *gstack.PacketBuffer) // takes over the packet, and finally calls take
	abort  func(tuple)                             // ends a handshake that is still in progress
	shake  func(tuple) shakeState                  // returns the state of a handshake
	answer func(syn []byte, why flow.Refusal)      // writes RST or ICMP; syn: the IP and TCP headers

	mu      sync.Mutex
	byKey   map[tuple]*pendingSYN
	waiting int
	shakes  int // entries of byKey that are opening
	peak    int // the largest len(byKey) since it was made
	heap    dueHeap
	timer   *time.Timer
	firing  bool
	idle    sync.Cond // signalled when firing becomes false
	refuse  bool      // every new SYN is answered with RST
	closed  bool

	shaking sync.WaitGroup // handshakes and openings: Done when the listener was told the result

	knocks map[*opening]struct{} // connections to the app that are being opened
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

// syn handles a SYN. It returns a request to pass on if the SYN is new and within the budgets. The caller keeps pkt.
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
			// Either gVisor is about to have its endpoint, or the handshake has failed. A SYN with another ISN is
			// retransmitted after that.
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
			t.stats.Replaced.Add(1)
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
		t.stats.OverBudget.Add(1)
	case over == spentDest:
		t.stats.OverDestBudget.Add(1)
	default:
		req = &pendingSYN{t: t, key: key, isn: isn, start: now, last: now, gap: synRTO, pkt: pkt.Clone(), index: -1}
		t.byKey[key] = req
		t.peak = max(t.peak, len(t.byKey))
		t.waiting++
		t.stats.SYNs.Add(1)
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

// again records another SYN for e, and returns whether and how it must be answered again.
func (t *pendingTable) again(e *pendingSYN, isn uint32, pkt *gstack.PacketBuffer, now time.Time) (flow.Refusal, bool) {
	if e.isn != isn {
		return 0, false
	}
	t.stats.Retransmits.Add(1)
	e.gap = min(max(now.Sub(e.last), synRTO), maxGap)
	e.last = now
	switch e.state {
	case synWaiting:
		// Keep the SYN with the newest timestamp: the round trip that the SYN-ACK's echo shows is then as short as
		// possible.
		e.pkt.DecRef()
		e.pkt = pkt.Clone()
		t.schedule(e, t.askAt(e))
	case synRefused, synSilent:
		t.schedule(e, e.over())
	}
	return e.why, e.state == synRefused
}

// rst handles a RST and reports whether it was for a waiting SYN.
func (t *pendingTable) rst(key tuple, seq uint32) bool {
	t.mu.Lock()
	e := t.byKey[key]
	// The sequence number is that of the SYN or, counting the SYN and data of TCP Fast Open, slightly higher.
	if e == nil || e.state != synWaiting || seq-e.isn > 1<<16 {
		t.mu.Unlock()
		return false
	}
	t.stats.Cancelled.Add(1)
	cancel := t.cancel(e)
	t.mu.Unlock()
	cancel()
	return true
}

// over returns the time after which e's SYN is certainly not retransmitted.
func (e *pendingSYN) over() time.Time { return e.last.Add(2*e.gap + synRTO) }

// askAt returns when to query the app's kernel for the socket: at the first missed retransmission. Linux sends four
// at intervals of a second and doubles the gap only then (tcp_syn_linear_timeouts), so twice the last gap is the
// latest time. If there is no way to query, it is the time when the SYN is over.
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

// The functions below are called with the lock held, unless they say otherwise.

// leave ends e's waiting and releases its budget and packet.
func (t *pendingTable) leave(e *pendingSYN) {
	t.waiting--
	t.stats.pending.Add(-1)
	t.budget.give(e.key.dst.Addr())
	if e.pkt != nil {
		e.pkt.DecRef()
		e.pkt = nil
	}
}

// drop removes e from the table and sets its state.
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

// remove removes e from the table. It replaces the map of a past burst by a smaller one when little of it is left,
// because a map never shrinks.
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

// remake is the size from which on a table is replaced when an eighth is left.
const remake = 1000

// cancel drops e and returns the function to call without the lock.
func (t *pendingTable) cancel(e *pendingSYN) func() {
	t.drop(e, synCancelled)
	f := e.onCancel
	e.onCancel = nil
	if f == nil {
		f = func() {}
	}
	return f
}

// schedule sets the time at which the timer checks e.
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

// dueHeap is a heap of entries, ordered by due.
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
