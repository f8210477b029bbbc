package stack

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
)

// budget counts the SYNs of all shards that wait for an answer: in total, and for each destination address.
type budget struct {
	waiting atomic.Int64
	seed    maphash.Seed
	dests   [destStripes]destCounts
}

// destStripes is the number of locks for the counts of the destinations. Each is held for one look-up in a map.
const destStripes = 16

type destCounts struct {
	mu   sync.Mutex
	n    map[netip.Addr]int
	peak int // the largest len(n) since the map was made
	_    [64]byte
}

func newBudget() *budget {
	b := &budget{seed: maphash.MakeSeed()}
	for i := range b.dests {
		b.dests[i].n = make(map[netip.Addr]int)
	}
	return b
}

// spent is the reason for which a budget refuses a SYN.
type spent uint8

const (
	within    spent = iota
	spentAll        // too many in total
	spentDest       // too many for this destination
)

func (b *budget) stripe(dst netip.Addr) *destCounts {
	return &b.dests[maphash.Comparable(b.seed, dst)%destStripes]
}

// take counts a SYN unless this would exceed a limit.
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

// give undoes take. It replaces the map of a past burst by a smaller one when little of it is left, because a map
// never shrinks.
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
