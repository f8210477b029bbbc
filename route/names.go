package route

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/dns"
)

// Rules with names need the name of a flow, but a packet has none. The names used are those for which route/dns
// returned the address: a program that asks for a name and then connects to an address in the answer means this name.
// An address that serves several names has all of them.

const (
	// An answer is valid for as long as it says, but at least for nameMin, because programs connect a little later,
	// and at most for nameMax.
	nameMin = time.Minute
	nameMax = 24 * time.Hour
	// Limits of the number of addresses, and of the names of one address. Of an address, the oldest name is dropped
	// first; of the addresses, those that have expired.
	maxNamed = 1 << 16
	maxNames = 8
)

// nameTable stores for which names an address was the answer. Its methods may be called from any goroutine.
type nameTable struct {
	// changes counts additions. A verdict from before an addition is no longer valid.
	changes atomic.Uint64

	mu     sync.RWMutex
	byAddr map[netip.Addr][]knownName
}

// knownName is a name and the time until which it is valid, on the Router's clock.
type knownName struct {
	name  string
	until int64
}

// learn stores the content of an answer of DNS.
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
			if now >= have[i].until { // it had expired meanwhile
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

// makeRoom drops at least a sixteenth of the addresses, so that this walk is rare.
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
	for a := range t.byAddr { // in random order
		if len(t.byAddr) <= maxNamed-maxNamed/16 {
			return
		}
		delete(t.byAddr, a)
	}
}

// of appends the names of an address to to.
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
