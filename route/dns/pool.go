package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

const (
	// maxNames is how many names can have a fake address at the same time if the pool has so many addresses;
	// 198.18.0.0/15 has. They take 5 MB plus the bytes of the names.
	maxNames = 1 << 17
	// minNames is the capacity of the smallest pool.
	minNames = 256
	// maxNameBytes limits the bytes of all names; half as many again may wait to be reclaimed. A host name has about
	// 25 bytes.
	maxNameBytes = 8 << 20
)

// PoolConfig is the configuration of a Pool.
type PoolConfig struct {
	// V4 and V6 are the ranges of addresses. The first flow.PoolReserve addresses of each are left out, because they
	// contain the TUN's own. If one range has fewer addresses, the pool has room for fewer names.
	V4, V6 netip.Prefix
	// TTL is how long an answer may be cached. An address stays with its name for that long after each answer and
	// after the end of each flow.
	TTL time.Duration
	// Now is a clock that never goes back. nil: the system's.
	Now func() time.Duration
}

// Pool gives each name an address of each family, and finds the name of each address that it gave out. When all
// addresses are in use, a new name gets the one that was not asked for the longest time, but never one that a flow
// uses or that was given out less than its TTL ago. Its methods may be called from any goroutine. Each takes constant
// time, except when a table grows.
//
// Names are in lower case and without the dot at the end. The same entry number stands for both addresses of a name.
type Pool struct {
	v4, v6 netip.Prefix
	base4  uint32
	base6  [2]uint64
	size   uint32
	ttl    time.Duration
	now    func() time.Duration
	seed   maphash.Seed

	mu      sync.Mutex
	entries []entry
	index   []uint32 // hash table of entry numbers plus one; open addressing, at most half full
	names   []byte   // of all entries, one after the other
	waste   int      // bytes in names that belong to no entry any more
	used    int      // entries that have a name
	held    int      // those of them that a flow uses
	oldest  uint32   // of those that no flow uses
	newest  uint32
	free    uint32 // entries without a name, linked by next
	changes uint64
	refused uint64
	evicted uint64
}

// entry contains no pointers, so the garbage collector does not scan the table. until and the order of the list refer
// to the last answer or the end of the last flow: the oldest entry in the list is the first to expire.
type entry struct {
	until      time.Duration
	name       uint32
	hash       uint32
	prev, next uint32 // to the next older and newer entries; not linked while refs > 0
	refs       uint32
	len        uint8 // 0: no name
}

const none = ^uint32(0)

// PoolStats is a snapshot of the counters.
type PoolStats struct {
	Names   int    `metric:"fake_names" help:"Names that have a fake address."`
	Size    int    `metric:"fake_names_max" help:"Names that can have a fake address."`
	Held    int    `metric:"fake_names_held" help:"Names with a fake address that flows use."`
	Evicted uint64 `metric:"fake_names_evicted_total" help:"Names that lost their fake address to another name."`
	Refused uint64 `metric:"fake_names_refused_total" help:"Names that got no fake address because all are in use."`
}

// NewPool returns a Pool, or an error if the ranges are not valid.
func NewPool(cfg PoolConfig) (*Pool, error) {
	if !cfg.V4.IsValid() || !cfg.V4.Addr().Is4() {
		return nil, fmt.Errorf("cannot give out addresses of %v: it is not an IPv4 network", cfg.V4)
	}
	if !cfg.V6.IsValid() || !cfg.V6.Addr().Is6() || cfg.V6.Addr().Is4In6() {
		return nil, fmt.Errorf("cannot give out addresses of %v: it is not an IPv6 network", cfg.V6)
	}
	if cfg.TTL <= 0 {
		return nil, errors.New("cannot give out addresses without a TTL")
	}
	p := &Pool{
		v4: cfg.V4.Masked(), v6: cfg.V6.Masked(), ttl: cfg.TTL, now: cfg.Now, seed: maphash.MakeSeed(),
		oldest: none, newest: none, free: none,
	}
	if p.now == nil {
		start := time.Now()
		p.now = func() time.Duration { return time.Since(start) }
	}
	for _, r := range []netip.Prefix{p.v4, p.v6} {
		size := uint64(maxNames)
		if bits := r.Addr().BitLen() - r.Bits(); bits < 32 {
			size = min(size, max(uint64(1)<<bits, flow.PoolReserve)-flow.PoolReserve)
		}
		if size < minNames {
			return nil, fmt.Errorf("cannot give out addresses of %v: it has too few, %d names must have one", r, minNames)
		}
		if p.size == 0 || uint32(size) < p.size {
			p.size = uint32(size)
		}
	}
	a4, a6 := p.v4.Addr().As4(), p.v6.Addr().As16()
	p.base4 = binary.BigEndian.Uint32(a4[:]) + flow.PoolReserve
	p.base6 = [2]uint64{binary.BigEndian.Uint64(a6[:]), binary.BigEndian.Uint64(a6[8:]) + flow.PoolReserve}
	return p, nil
}

// Contains reports whether a is in the ranges, whether or not it stands for a name.
func (p *Pool) Contains(a netip.Addr) bool { return p.v4.Contains(a) || p.v6.Contains(a) }

// TTL returns how long an answer may be cached.
func (p *Pool) TTL() time.Duration { return p.ttl }

// Give returns the addresses that stand for name, which it does not keep. ok is false if every address is in use or
// was given out less than its TTL ago, or if name is empty or longer than 255 bytes.
func (p *Pool) Give(name []byte) (v4, v6 netip.Addr, ok bool) {
	if len(name) == 0 || len(name) > maxName {
		return v4, v6, false
	}
	h := p.hash(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	i := p.find(name, h)
	if i == none {
		if i = p.take(len(name), now); i == none {
			p.refused++
			return v4, v6, false
		}
		p.put(i, name, h)
	} else if p.entries[i].refs == 0 {
		p.unlink(i)
	}
	e := &p.entries[i]
	e.until = max(e.until, now+p.ttl)
	if e.refs == 0 {
		p.link(i)
	}
	p.changes++
	return p.addr4(i), p.addr6(i), true
}

// AppendName appends the name that a stands for to b. ok is false if it stands for none.
func (p *Pool) AppendName(b []byte, a netip.Addr) (_ []byte, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.number(a)
	if i == none {
		return b, false
	}
	return append(b, p.name(i)...), true
}

// Lease keeps an address assigned to its name. The zero Lease keeps none.
type Lease struct {
	p *Pool
	i uint32
}

// Hold returns the name that a stands for. a keeps standing for it until the Lease is released. ok is false if a
// stands for none.
func (p *Pool) Hold(a netip.Addr) (name string, l Lease, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.number(a)
	if i == none {
		return "", Lease{}, false
	}
	e := &p.entries[i]
	if e.refs == 0 {
		p.unlink(i)
		p.held++
	}
	e.refs++
	return string(p.name(i)), Lease{p, i}, true
}

// Release ends the hold. A second call on the same variable has no effect.
func (l *Lease) Release() {
	p := l.p
	if p == nil {
		return
	}
	l.p = nil
	p.mu.Lock()
	defer p.mu.Unlock()
	e := &p.entries[l.i]
	if e.refs--; e.refs > 0 {
		return
	}
	p.held--
	e.until = max(e.until, p.now()+p.ttl) // the program may come back without asking again
	p.link(l.i)
}

// Stats returns the counters.
func (p *Pool) Stats() PoolStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return PoolStats{Names: p.used, Size: int(p.size), Held: p.held, Evicted: p.evicted, Refused: p.refused}
}

// The methods below are called with mu held.

func (p *Pool) name(i uint32) []byte {
	e := &p.entries[i]
	return p.names[e.name : e.name+uint32(e.len)]
}

func (p *Pool) addr4(i uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], p.base4+i)
	return netip.AddrFrom4(b)
}

func (p *Pool) addr6(i uint32) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], p.base6[0])
	binary.BigEndian.PutUint64(b[8:], p.base6[1]+uint64(i))
	return netip.AddrFrom16(b)
}

// number returns the entry whose address is a, if it has a name.
func (p *Pool) number(a netip.Addr) uint32 {
	i := uint64(none)
	switch {
	case a.Is4():
		b := a.As4()
		i = uint64(binary.BigEndian.Uint32(b[:]) - p.base4)
	case a.Is6() && a.Zone() == "":
		b := a.As16()
		if binary.BigEndian.Uint64(b[:]) == p.base6[0] {
			i = binary.BigEndian.Uint64(b[8:]) - p.base6[1]
		}
	}
	if i >= uint64(len(p.entries)) || p.entries[i].len == 0 {
		return none
	}
	return uint32(i)
}

// take returns an entry without a name, and makes room for a name of n bytes; none: there is none.
func (p *Pool) take(n int, now time.Duration) uint32 {
	for len(p.names)+n-p.waste > maxNameBytes {
		if !p.evict(now) {
			return none
		}
	}
	if p.free == none && len(p.entries) == int(p.size) && !p.evict(now) {
		return none
	}
	if i := p.free; i != none {
		p.free = p.entries[i].next
		return i
	}
	p.entries = append(p.entries, entry{})
	return uint32(len(p.entries) - 1)
}

// evict takes the address of the oldest name if that is allowed.
func (p *Pool) evict(now time.Duration) bool {
	i := p.oldest
	if i == none || p.entries[i].until > now {
		return false
	}
	p.drop(i)
	p.evicted++
	return true
}

// drop removes the name from a linked entry.
func (p *Pool) drop(i uint32) {
	p.unlink(i)
	e := &p.entries[i]
	p.forget(i)
	p.waste += int(e.len)
	p.used--
	*e = entry{next: p.free}
	p.free = i
}

// put gives entry i a name. It is not linked yet.
func (p *Pool) put(i uint32, name []byte, h uint32) {
	if p.waste > 1<<16 && p.waste > len(p.names)/3 {
		p.compact()
	}
	p.entries[i] = entry{name: uint32(len(p.names)), len: uint8(len(name)), hash: h, prev: none, next: none}
	p.names = append(p.names, name...)
	p.used++
	if 2*p.used > len(p.index) {
		p.grow()
	} else {
		p.enter(i)
	}
}

// compact removes the bytes of names that are gone, which are at least a third. Each name is therefore copied only a
// few times.
func (p *Pool) compact() {
	live := len(p.names) - p.waste
	names := make([]byte, 0, live+live/2+1<<16)
	for i := range p.entries {
		if e := &p.entries[i]; e.len > 0 {
			at := len(names)
			names = append(names, p.name(uint32(i))...)
			e.name = uint32(at)
		}
	}
	p.names, p.waste = names, 0
}

func (p *Pool) link(i uint32) {
	e := &p.entries[i]
	e.prev, e.next = p.newest, none
	if p.newest != none {
		p.entries[p.newest].next = i
	} else {
		p.oldest = i
	}
	p.newest = i
}

func (p *Pool) unlink(i uint32) {
	e := &p.entries[i]
	if e.prev != none {
		p.entries[e.prev].next = e.next
	} else {
		p.oldest = e.next
	}
	if e.next != none {
		p.entries[e.next].prev = e.prev
	} else {
		p.newest = e.prev
	}
	e.prev, e.next = none, none
}

// hash is keyed, so that nobody can choose names that collide.
func (p *Pool) hash(name []byte) uint32 { return uint32(maphash.Bytes(p.seed, name)) }

func (p *Pool) find(name []byte, h uint32) uint32 {
	if len(p.index) == 0 {
		return none
	}
	mask := uint32(len(p.index) - 1)
	for at := h & mask; p.index[at] != 0; at = (at + 1) & mask {
		i := p.index[at] - 1
		if p.entries[i].hash == h && string(p.name(i)) == string(name) {
			return i
		}
	}
	return none
}

func (p *Pool) enter(i uint32) {
	mask := uint32(len(p.index) - 1)
	at := p.entries[i].hash & mask
	for p.index[at] != 0 {
		at = (at + 1) & mask
	}
	p.index[at] = i + 1
}

func (p *Pool) grow() {
	p.index = make([]uint32, max(2*len(p.index), 256))
	for i := range p.entries {
		if p.entries[i].len > 0 {
			p.enter(uint32(i))
		}
	}
}

// forget removes i from the index, and moves later entries that would no longer be found.
func (p *Pool) forget(i uint32) {
	mask := uint32(len(p.index) - 1)
	hole := p.entries[i].hash & mask
	for p.index[hole] != i+1 {
		hole = (hole + 1) & mask
	}
	for at := (hole + 1) & mask; p.index[at] != 0; at = (at + 1) & mask {
		home := p.entries[p.index[at]-1].hash & mask
		if (at-home)&mask >= (at-hole)&mask {
			p.index[hole] = p.index[at]
			hole = at
		}
	}
	p.index[hole] = 0
}
