package dns

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// fakeClock is a clock that a test moves.
type fakeClock struct{ t time.Duration }

func (c *fakeClock) now() time.Duration { return c.t }

func newTestPool(t testing.TB, v4 string, ttl time.Duration) (*Pool, *fakeClock) {
	t.Helper()
	c := &fakeClock{}
	p, err := NewPool(PoolConfig{V4: netip.MustParsePrefix(v4), V6: flow.Pool6, TTL: ttl, Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return p, c
}

func TestPoolRanges(t *testing.T) {
	for _, tt := range []struct {
		v4, v6 string
		size   int
	}{
		{"198.18.0.0/15", "fd76:6961:736f:636b::/64", 1<<17 - flow.PoolReserve},
		{"198.18.0.0/23", "fd76:6961:736f:636b::/64", 256},
		{"198.18.0.0/24", "fd76:6961:736f:636b::/64", 0},
		{"198.18.0.0/32", "fd76:6961:736f:636b::/64", 0},
		{"0.0.0.0/0", "::/0", maxNames},
		{"198.18.0.0/15", "fd00::/118", 768},
		{"198.18.0.0/15", "fd00::/120", 0},
		{"fd00::/64", "fd76:6961:736f:636b::/64", 0},
		{"198.18.0.0/15", "198.18.0.0/15", 0},
		{"198.18.0.0/15", "::ffff:198.18.0.0/111", 0},
	} {
		p, err := NewPool(PoolConfig{V4: netip.MustParsePrefix(tt.v4), V6: netip.MustParsePrefix(tt.v6), TTL: time.Second})
		if (err == nil) != (tt.size > 0) || err == nil && p.Stats().Size != tt.size {
			t.Errorf("%s and %s: %v, want a pool of %d", tt.v4, tt.v6, err, tt.size)
			continue
		}
		if err != nil {
			continue
		}
		for _, a := range []netip.Addr{flow.TUN4, flow.TUN6, flow.Gateway4, flow.Gateway6, p.v4.Addr(), p.v6.Addr()} {
			if p.number(a) != none {
				t.Errorf("%s and %s: %v stands for a name", tt.v4, tt.v6, a)
			}
		}
	}
}

// model is what the pool must be, in plain words.
type model struct {
	addr  map[string]netip.Addr // of each name
	name  map[netip.Addr]string
	until map[string]time.Duration // given out, or used by a flow, less than the TTL ago
	held  map[string]int
}

// TestPoolProperties: random operations on a pool that is always too small, against a model.
func TestPoolProperties(t *testing.T) {
	const ttl = 10 * time.Second
	for seed := range uint64(20) {
		p, clock := newTestPool(t, "198.18.0.0/23", ttl)
		r := rand.New(rand.NewPCG(seed, 1))
		m := model{map[string]netip.Addr{}, map[netip.Addr]string{}, map[string]time.Duration{}, map[string]int{}}
		type hold struct {
			name string
			l    Lease
		}
		var holds []hold
		refused, given := 0, 0
		for step := range 20_000 {
			switch op := r.IntN(10); {
			case op < 6:
				name := fmt.Sprintf("n%d.example", r.IntN(600))
				if r.IntN(4) == 0 {
					name += strings.Repeat("x", r.IntN(200))
				}
				v4, v6, ok := p.Give([]byte(name))
				if !ok {
					refused++
					for n := range m.addr {
						if m.held[n] == 0 && m.until[n] <= clock.t {
							t.Fatalf("seed %d step %d: nothing for %s, and %s could go", seed, step, name, n)
						}
					}
					if len(m.addr) < p.Stats().Size {
						t.Fatalf("seed %d step %d: nothing for %s, with %d names", seed, step, name, len(m.addr))
					}
					break
				}
				given++
				if was, known := m.addr[name]; known && was != v4 {
					if m.held[name] > 0 || m.until[name] > clock.t {
						t.Fatalf("seed %d step %d: %s moved from %v to %v", seed, step, name, was, v4)
					}
					delete(m.name, was)
				}
				if owner, taken := m.name[v4]; taken && owner != name {
					if m.held[owner] > 0 || m.until[owner] > clock.t {
						t.Fatalf(
							"seed %d step %d: %v was taken from %s, which has it until %v and %d times now",
							seed,
							step,
							v4,
							owner,
							m.until[owner],
							m.held[owner],
						)
					}
					delete(m.addr, owner)
				}
				m.addr[name], m.name[v4] = v4, name
				m.until[name] = max(m.until[name], clock.t+ttl)
				if !p.Contains(v4) || !p.Contains(v6) {
					t.Fatalf("%v or %v is not in the pool", v4, v6)
				}
				if b, ok := p.AppendName(nil, v6); !ok || string(b) != name {
					t.Fatalf("%v stands for %q, not for %q", v6, b, name)
				}
			case op < 7:
				for a, want := range m.name {
					name, l, ok := p.Hold(a)
					if !ok || name != want {
						t.Fatalf("seed %d step %d: %v stands for %q, want %q", seed, step, a, name, want)
					}
					m.held[name]++
					holds = append(holds, hold{name, l})
					break
				}
			case op < 9 && len(holds) > r.IntN(100):
				i := r.IntN(len(holds))
				h := holds[i]
				holds[i] = holds[len(holds)-1]
				holds = holds[:len(holds)-1]
				h.l.Release()
				h.l.Release() // has no effect
				if m.held[h.name]--; m.held[h.name] == 0 {
					m.until[h.name] = max(m.until[h.name], clock.t+ttl)
				}
			default:
				clock.t += time.Duration(r.IntN(int(ttl / 60)))
			}
		}
		for a, want := range m.name {
			if b, ok := p.AppendName(nil, a); m.addr[want] == a && (!ok || string(b) != want) {
				t.Errorf("seed %d: %v stands for %q, want %q", seed, a, b, want)
			}
		}
		if refused == 0 || given == 0 || p.Stats().Evicted == 0 {
			t.Errorf("seed %d: %d given, %d refused, %d evicted: the test tests nothing", seed, given, refused, p.Stats().Evicted)
		}
		for i := range holds {
			holds[i].l.Release()
		}
		if held := p.Stats().Held; held != 0 {
			t.Errorf("seed %d: %d are held in the end", seed, held)
		}
	}
}

// TestPoolLeastRecentlyUsed: the name that was not asked for longest goes.
func TestPoolLeastRecentlyUsed(t *testing.T) {
	p, clock := newTestPool(t, "198.18.0.0/23", time.Second)
	name := func(i int) []byte { return fmt.Appendf(nil, "n%d", i) }
	first, _, _ := p.Give(name(0))
	second, _, _ := p.Give(name(1))
	for i := 2; i < 256; i++ {
		p.Give(name(i))
	}
	clock.t = 2 * time.Second
	p.Give(name(0)) // asked again
	if got, _, ok := p.Give(name(256)); !ok || got != second {
		t.Errorf("a new name has %v, want %v", got, second)
	}
	if b, ok := p.AppendName(nil, first); !ok || string(b) != "n0" {
		t.Errorf("%v stands for %q", first, b)
	}
}

// TestPoolNameBytes: names of 255 bytes do not cost more than maxNameBytes.
func TestPoolNameBytes(t *testing.T) {
	p, clock := newTestPool(t, "198.18.0.0/15", time.Second)
	name := bytes.Repeat([]byte{'a'}, 255)
	for i := range 100_000 {
		copy(name, fmt.Sprintf("%08d", i))
		clock.t += time.Second
		if _, _, ok := p.Give(name); !ok {
			t.Fatalf("name %d has no address", i)
		}
		if len(p.names) > maxNameBytes*3/2+1<<16 || cap(p.names) > 2*maxNameBytes {
			t.Fatalf("the names take %d of %d bytes", len(p.names), cap(p.names))
		}
	}
	if st := p.Stats(); st.Names != maxNameBytes/255 {
		t.Errorf("%+v", st)
	}
}

// TestPoolMemory: 100,000 names of usual length cost less than 30 MB.
func TestPoolMemory(t *testing.T) {
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	p, _ := newTestPool(t, "198.18.0.0/15", time.Second)
	var name []byte
	for i := range 100_000 {
		name = fmt.Appendf(name[:0], "host-%d.some-service.example.com", i)
		if _, _, ok := p.Give(name); !ok {
			t.Fatalf("name %d has no address", i)
		}
	}
	cost := heap() - before
	if cost > 20<<20 {
		t.Errorf("100,000 names cost %d bytes", cost)
	}
	t.Logf("100,000 names cost %.1f MB", float64(cost)/1e6)
	runtime.KeepAlive(p)
}

func TestPoolAllocatesNothing(t *testing.T) {
	p, _ := newTestPool(t, "198.18.0.0/15", time.Second)
	name := []byte("www.example.com")
	a, _, _ := p.Give(name)
	buf := make([]byte, 0, 256)
	if n := testing.AllocsPerRun(100, func() {
		p.Give(name)
		p.AppendName(buf, a)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkPoolGive(b *testing.B) {
	p, _ := newTestPool(b, "198.18.0.0/15", time.Nanosecond)
	name := []byte("00000000.example.com")
	for i := 0; b.Loop(); i++ {
		for at, n := 7, i; at >= 0; at, n = at-1, n/10 {
			name[at] = byte('0' + n%10)
		}
		p.Give(name)
	}
}
