package route

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/dns"
)

// Rules that speak of names need the name of a flow, and a packet has none. The names are those that route/dns gave the
// address as an answer for: whoever asked for a name and then connects to an address of the answer means this name. An
// address that serves several names has all of them.

const (
	// An answer is believed for as long as it says, but for nameMin at least, since programs connect a little later, and
	// for nameMax at most.
	nameMin = time.Minute
	nameMax = 24 * time.Hour
	// Bounds: addresses, and names of one address. What is over them is forgotten, the oldest name of an address first,
	// and among the addresses those that have ended.
	maxNamed = 1 << 16
	maxNames = 8
)

// nameTable knows which names an address was an answer for. Its methods may be called from any goroutine.
type nameTable struct {
	// changes counts what was added. A verdict that was taken before is not valid after it.
	changes atomic.Uint64

	mu     sync.RWMutex
	byAddr map[netip.Addr][]knownName
}

// knownName is a name and until when it is believed, on the Router's clock.
type knownName struct {
	name  string
	until int64
}

// learn takes in an answer of DNS.
func (t *nameTable) learn(msg []byte, now int64) {
	dns.Addresses(msg, func(name string, a netip.Addr, ttl time.Duration) {
		t.add(a, name, now, now+int64(min(max(ttl, nameMin), nameMax)))
	})
}

func (t *nameTable) add(a netip.Addr, name string, now, until int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byAddr == nil {
		t.byAddr = make(map[netip.Addr][]knownName)
	}
	have := t.byAddr[a]
	oldest := 0
	for i := range have {
		if have[i].name == name {
			if now >= have[i].until { // it had none meanwhile
				t.changes.Add(1)
			}
			have[i].until = max(have[i].until, until)
			return
		}
		if have[i].until < have[oldest].until {
			oldest = i
		}
	}
	t.changes.Add(1)
	if len(have) == maxNames {
		have[oldest] = knownName{name, until}
		return
	}
	if len(have) == 0 && len(t.byAddr) >= maxNamed {
		t.makeRoom(now)
	}
	t.byAddr[a] = append(have, knownName{name, until})
}

// makeRoom forgets a sixteenth of the addresses at least: the walk is rare then.
func (t *nameTable) makeRoom(now int64) {
	over := func(names []knownName) bool {
		for _, n := range names {
			if now < n.until {
				return false
			}
		}
		return true
	}
	for a, names := range t.byAddr {
		if over(names) {
			delete(t.byAddr, a)
		}
	}
	for a := range t.byAddr { // in no order
		if len(t.byAddr) <= maxNamed-maxNamed/16 {
			return
		}
		delete(t.byAddr, a)
	}
}

// of appends the names of an address.
func (t *nameTable) of(a netip.Addr, now int64, to []string) []string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, n := range t.byAddr[a] {
		if now < n.until {
			to = append(to, n.name)
		}
	}
	return to
}
