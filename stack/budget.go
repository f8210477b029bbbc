package stack

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
)

// budget counts the SYNs that wait for an answer, of all shards: in all, and for each destination address.
type budget struct {
	waiting atomic.Int64
	seed    maphash.Seed
	dests   [destStripes]destCounts
}

// destStripes is how many locks the counts of the destinations have. Each is held for one look into a map.
const destStripes = 16

type destCounts struct {
	mu   sync.Mutex
	n    map[netip.Addr]int
	peak int // of len(n) since it was made
	_    [64]byte
}

func newBudget() *budget {
	b := &budget{seed: maphash.MakeSeed()}
	for i := range b.dests {
		b.dests[i].n = make(map[netip.Addr]int)
	}
	return b
}

// spent is what a budget refuses for.
type spent uint8

const (
	within    spent = iota
	spentAll        // too many in all
	spentDest       // too many for this destination
)

func (b *budget) stripe(dst netip.Addr) *destCounts {
	return &b.dests[maphash.Comparable(b.seed, dst)%destStripes]
}

// take counts a SYN, unless it is over a limit.
func (b *budget) take(dst netip.Addr, l Limits) spent {
	if b.waiting.Add(1) > int64(l.Pending) {
		b.waiting.Add(-1)
		return spentAll
	}
	c := b.stripe(dst)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n[dst] >= l.PendingPerDest {
		b.waiting.Add(-1)
		return spentDest
	}
	c.n[dst]++
	c.peak = max(c.peak, len(c.n))
	return within
}

// give ends what take counted. What a burst made is given back when little of it is left: a map never shrinks.
func (b *budget) give(dst netip.Addr) {
	b.waiting.Add(-1)
	c := b.stripe(dst)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n[dst]--; c.n[dst] == 0 {
		delete(c.n, dst)
	}
	if c.peak > remake/destStripes && len(c.n) <= c.peak/8 {
		left := make(map[netip.Addr]int, len(c.n))
		for a, n := range c.n {
			left[a] = n
		}
		c.n, c.peak = left, len(left)
	}
}
