package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"runtime"
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
