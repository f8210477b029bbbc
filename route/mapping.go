package route

import (
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// mapping is the UDP state of one app endpoint, whatever its peers (RFC 4787, section 4.1: endpoint-independent).
// Incoming datagrams are delivered whoever sent them (section 5). All fields except the atomics are guarded by
// udp.mu.
type mapping struct {
	s      *shard
	src    netip.AddrPort
	id     uint64
	start  time.Time
	first  netip.AddrPort // the first destination, and the rule that decided on it, for the log
	rule   *verdict
	assocs []*assoc // one for each upstream that the verdicts require; rarely more than one

	older, newer *mapping // ordered by the app's last datagram
	index        int      // in mappings.all

	lastUp    int64 // Router.now
	notYet    int64 // the app's socket existed: the next check is not before this time
	ask       asking
	askedGone int64 // when its kernel last reported port unreachable and we checked whether that is true
	kept      *kept // whoever keeps the mapping from ending; nil: nobody
	oneShot   bool  // all its traffic was to ports with single questions and answers
	upPkts    uint64
	upBytes   uint64

	host   string                        // the name that first stands for, if that is a fake address
	named  map[netip.AddrPort]*namedDest // the fake destinations
	itself map[netip.AddrPort]struct{}   // real addresses of them that the app writes to as well
	back   atomic.Pointer[backTable]     // nil: there are none

	gone      atomic.Bool // ended: a loop may still deliver to it for a moment
	lastDown  atomic.Int64
	downPkts  atomic.Uint64
	downBytes atomic.Uint64
}

// lastSeen returns when the last datagram passed in either direction.
func (m *mapping) lastSeen() int64 { return max(m.lastUp, m.lastDown.Load()) }

// mappings is the table of mappings. Its lock is taken once for each burst of datagrams and held while they are sent,
// so that only one goroutine uses a link at a time. Others hold it only briefly.
type mappings struct {
	mu      sync.Mutex
	bySrc   map[netip.AddrPort]*mapping
	all     []*mapping // for walks in small steps
	oldest  *mapping
	newest  *mapping
	walk    int // where the next step starts
	queued  int // bytes in all queues
	room    int // limit of queued
	dialing int // associations that have a try and no link
	cache   cache
	deep    *deepCache // used instead of cache; nil: cache is right
	owners  owners
	far     farTable
	clos    bool // closing: no new mappings

	life, shortLife, pinned time.Duration
	most                    int // Limits.Mappings
}

// init prepares the table of one of shards shards.
func (t *mappings) init(shards int) {
	t.room = queuedAll / shards
	t.bySrc = make(map[netip.AddrPort]*mapping)
	t.live(0)
}

// DefaultUDPTimeout is the recommendation of RFC 4787, section 4.3, REQ-5.
const DefaultUDPTimeout = 5 * time.Minute

// live sets how long mappings live. 0: DefaultUDPTimeout.
func (t *mappings) live(udp time.Duration) {
	t.life = DefaultUDPTimeout
	t.shortLife = 30 * time.Second // questions and answers
	t.pinned = time.Minute         // between two checks of the app's socket
	if udp > 0 {
		t.life, t.shortLife, t.pinned = udp, min(udp, t.shortLife), min(udp, t.pinned)
	}
}

func (t *mappings) add(m *mapping) {
	t.bySrc[m.src] = m
	m.index = len(t.all)
	t.all = append(t.all, m)
	t.pushNewest(m)
}

func (t *mappings) pushNewest(m *mapping) {
	m.older, m.newer = t.newest, nil
	if t.newest != nil {
		t.newest.newer = m
	} else {
		t.oldest = m
	}
	t.newest = m
}

func (t *mappings) unlink(m *mapping) {
	if m.older != nil {
		m.older.newer = m.newer
	} else {
		t.oldest = m.newer
	}
	if m.newer != nil {
		m.newer.older = m.older
	} else {
		t.newest = m.older
	}
	m.older, m.newer = nil, nil
}

// idleSince returns when the last datagram of the mapping with the longest idle time came.
func (t *mappings) idleSince() int64 {
	if t.oldest == nil {
		return math.MaxInt64
	}
	return t.oldest.lastUp
}

func (t *mappings) touch(m *mapping) {
	if t.newest != m {
		t.unlink(m)
		t.pushNewest(m)
	}
}

func (t *mappings) remove(m *mapping) {
	delete(t.bySrc, m.src)
	last := len(t.all) - 1
	t.all[m.index] = t.all[last]
	t.all[m.index].index = m.index
	t.all[last] = nil
	t.all = t.all[:last]
	if cap(t.all) > remake && last <= cap(t.all)/8 { // the slice of a past burst is replaced by a smaller one
		t.bySrc, t.all = maps.Collect(maps.All(t.bySrc)), slices.Clone(t.all)
	}
	t.unlink(m)
	m.gone.Store(true)
}

// assocOf returns m's association with up, or nil; m may be nil.
func (m *mapping) assocOf(up *upstream) *assoc {
	if m == nil {
		return nil
	}
	for _, a := range m.assocs {
		if a.up == up {
			return a
		}
	}
	return nil
}

func (m *mapping) drop(a *assoc) {
	for i := range m.assocs {
		if m.assocs[i] == a {
			m.assocs = append(m.assocs[:i], m.assocs[i+1:]...)
			return
		}
	}
}

// oneShotPort reports whether a port belongs to a service with single questions and answers (RFC 4787, REQ-5 a): DNS
// and NTP.
func oneShotPort(port uint16) bool { return port == 53 || port == 123 }

func (m *mapping) info() FlowInfo {
	i := info(m.id, flow.UDP, m.src, m.first, m.start)
	i.Host, i.Rule, i.Upstream = m.host, m.rule.rule, m.rule.up.name
	i.State = "retrying"
	for _, a := range m.assocs {
		switch {
		case a.link != nil:
			i.State = "open"
		case a.try != nil && i.State != "open":
			i.State = "dialing"
		}
	}
	i.Up, i.Down = m.upBytes, m.downBytes.Load()
	return i
}
