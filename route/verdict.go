package route

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
)

// verdict is what was decided about a flow. There is one for each rule, so verdicts are compared by pointer.
type verdict struct {
	kind kind
	up   *upstream // for carry
	rule string    // for the log
	hits hits
}

// hits counts decisions, separately for each shard and each on its own cache line, because it is written for each
// burst. It is nil for a verdict without a rule.
type hits []struct {
	n atomic.Uint64
	_ [56]byte
}

// hit counts n flows or datagrams of a shard.
func (v *verdict) hit(shard int, n uint64) {
	if v.hits != nil {
		v.hits[shard].n.Add(n)
	}
}

func (h hits) sum() (n uint64) {
	for i := range h {
		n += h[i].n.Load()
	}
	return n
}

type kind uint8

const (
	carry kind = iota
	reject
	drop
	resolve    // a question for route/dns
	impossible // to an address that nothing can be carried to: dropped
	mapPort    // a request for route/portmap
	await      // the owner of the socket must be looked up
	named      // a datagram to a fake address
)

var verdictAsk = &verdict{kind: await, rule: "none"}

// cacheSize is the number of destinations whose verdict is cached, with 48 bytes each. A DHT node contacts a few
// hundred in a minute.
const cacheSize = 1 << 10

// cache stores verdicts on datagrams by destination; a verdict depends on nothing else. It is direct mapped, and
// therefore limited, and its cost does not depend on the rules. It is guarded by the mappings' lock.
type cache [cacheSize]struct {
	dst netip.AddrPort
	v   *verdict
}

func (c *cache) slot(dst netip.AddrPort) int { return slotOf(dst) }

// slotOf distributes endpoints over the slots of a cache.
func slotOf(dst netip.AddrPort) int {
	b := dst.Addr().As16()
	h := binary.LittleEndian.Uint64(b[:]) ^ binary.LittleEndian.Uint64(b[8:])*0x9E3779B97F4A7C15 ^ uint64(dst.Port())<<40
	h *= 0xD6E8FEB86659FD93
	return int(h >> 54)
}
