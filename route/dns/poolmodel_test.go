package dns

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// modelTTL is the TTL of the pools that are compared with a model.
const modelTTL = 10 * time.Second

// modelNames is how many names ask for an address. The pool has 256, so that it is always too small.
const modelNames = 600

// modelled is a pool and what it must be, in plain words: every operation is done on both, and checked.
type modelled struct {
	t     testing.TB
	p     *Pool
	clock *fakeClock
	path  string // of the pool's file

	addr  map[string]netip.Addr // of each name
	name  map[netip.Addr]string
	twin  map[netip.Addr]netip.Addr // of each IPv4 address: the IPv6 address of the same name
	until map[string]time.Duration  // until then the name may not lose its address
	used  map[string]int            // when the name was last given out or released
	held  map[string]int
	holds []hold

	step, given, refused, evicted, flows int
}

type hold struct {
	name string
	l    Lease
}

func newModelled(t testing.TB, path string) *modelled {
	m := &modelled{
		t: t, path: path,
		addr: map[string]netip.Addr{}, name: map[netip.Addr]string{}, twin: map[netip.Addr]netip.Addr{},
		until: map[string]time.Duration{}, used: map[string]int{}, held: map[string]int{},
	}
	m.p, m.clock = newTestPool(t, "198.18.0.0/23", modelTTL)
	return m
}

func modelName(i int) string {
	name := fmt.Sprintf("n%d.example", i%modelNames)
	if i%4 == 0 {
		name += strings.Repeat(".xxxxxxxxx", i%20)
	}
	return name
}

// do is one operation: op and arg are any numbers.
func (m *modelled) do(op byte, arg int) {
	m.t.Helper()
	m.step++
	switch op % 32 {
	case 0:
		m.restart()
	case 1, 2, 3, 4, 5, 6, 7:
		m.hold(arg)
	case 8, 9, 10:
		m.release(arg)
	case 11, 12, 13:
		m.clock.t += time.Duration(arg) % (modelTTL / 20)
	default:
		m.give(modelName(arg))
	}
	m.checkBounds()
}

func (m *modelled) fatal(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("step %d: %s", m.step, fmt.Sprintf(format, args...))
}

// mayGo reports whether a name may lose its address.
func (m *modelled) mayGo(name string) bool { return m.held[name] == 0 && m.until[name] <= m.clock.t }

func (m *modelled) give(name string) {
	m.t.Helper()
	v4, v6, ok := m.p.Give([]byte(name))
	was, known := m.addr[name]
	if !ok {
		m.refused++
		if known {
			m.fatal("nothing for %s, which has %v", name, was)
		}
		for n := range m.addr {
			if m.mayGo(n) {
				m.fatal("nothing for %s, and %s could go", name, n)
			}
		}
		if len(m.addr) < m.p.Stats().Size {
			m.fatal("nothing for %s, with %d names", name, len(m.addr))
		}
		return
	}
	m.given++
	if known && was != v4 {
		m.fatal("%s moved from %v to %v", name, was, v4)
	}
	if owner, taken := m.name[v4]; taken && owner != name {
		m.lose(owner, v4)
	}
	if other, ok := m.twin[v4]; ok && other != v6 {
		m.fatal("%v was one name with %v and now is with %v", v4, other, v6)
	}
	m.addr[name], m.name[v4], m.twin[v4] = v4, name, v6
	m.until[name], m.used[name] = max(m.until[name], m.clock.t+modelTTL), m.step
	if !m.p.Contains(v4) || !m.p.Contains(v6) || !v4.Is4() || !v6.Is6() {
		m.fatal("%v or %v is not in the pool", v4, v6)
	}
	for _, a := range []netip.Addr{v4, v6} {
		if b, ok := m.p.AppendName(nil, a); !ok || string(b) != name {
			m.fatal("%v stands for %q, not for %q", a, b, name)
		}
	}
}

// lose takes the address from a name, which must be the one that was not used for longest.
func (m *modelled) lose(name string, a netip.Addr) {
	m.t.Helper()
	if !m.mayGo(name) {
		m.fatal("%v was taken from %s, which has it until %v and %d times at %v", a, name, m.until[name], m.held[name], m.clock.t)
	}
	for n := range m.addr {
		if m.held[n] == 0 && m.used[n] < m.used[name] {
			m.fatal("%s lost its address, and %s was not used for longer", name, n)
		}
	}
	m.evicted++
	delete(m.addr, name)
	delete(m.until, name)
	delete(m.used, name)
}

// hold begins a flow to the address of some name, of either family.
func (m *modelled) hold(arg int) {
	m.t.Helper()
	want := modelName(arg)
	a, known := m.addr[want]
	if !known || len(m.holds) >= 200 {
		return
	}
	if arg%2 == 1 {
		a = m.twin[a]
	}
	name, l, ok := m.p.Hold(a)
	if !ok || name != want {
		m.fatal("%v stands for %q, want %q", a, name, want)
	}
	m.held[name]++
	m.flows++
	m.holds = append(m.holds, hold{name, l})
}

// release ends a flow, twice, which has no effect.
func (m *modelled) release(arg int) {
	if len(m.holds) == 0 {
		return
	}
	i := arg % len(m.holds)
	h := m.holds[i]
	m.holds[i] = m.holds[len(m.holds)-1]
	m.holds = m.holds[:len(m.holds)-1]
	h.l.Release()
	h.l.Release()
	if m.held[h.name]--; m.held[h.name] == 0 {
		delete(m.held, h.name)
		m.until[h.name], m.used[h.name] = max(m.until[h.name], m.clock.t+modelTTL), m.step
	}
}

// restart saves the pool and loads it into a new one, as when viasocks is started again: flows are gone, addresses stay.
func (m *modelled) restart() {
	m.t.Helper()
	if m.path == "" {
		return
	}
	for len(m.holds) > 0 {
		m.release(0)
		m.step++
	}
	if err := m.p.Save(m.path); err != nil {
		m.fatal("%v", err)
	}
	// The file has milliseconds. What was used in one of them may come back in another order: here it comes in its own.
	m.p, m.clock = newTestPool(m.t, "198.18.0.0/23", modelTTL)
	if n, err := m.p.Load(m.path); err != nil || n != len(m.addr) {
		m.fatal("%d of %d names came back: %v", n, len(m.addr), err)
	}
	for n := range m.addr {
		m.until[n] = modelTTL
		m.used[n] = 0 // so that no order among them is asked for
	}
	m.checkAll()
}

func (m *modelled) checkBounds() {
	m.t.Helper()
	st := m.p.Stats()
	if st.Names != len(m.addr) || st.Held != len(m.held) || st.Names > st.Size {
		m.fatal("%+v, want %d names of which %d are held", st, len(m.addr), len(m.held))
	}
	if len(m.p.entries) > st.Size || len(m.p.index) > 4*st.Size || len(m.p.names)-m.p.waste > maxNameBytes {
		m.fatal("%d entries, %d places, %d bytes", len(m.p.entries), len(m.p.index), len(m.p.names))
	}
}

// checkAll compares every address of the pool with the model.
func (m *modelled) checkAll() {
	m.t.Helper()
	for i := range m.p.size {
		v4, v6 := m.p.addr4(i), m.p.addr6(i)
		want, known := m.name[v4]
		known = known && m.addr[want] == v4
		for _, a := range []netip.Addr{v4, v6} {
			if b, ok := m.p.AppendName(nil, a); ok != known || known && string(b) != want {
				m.fatal("%v stands for %q (%v), want %q (%v)", a, b, ok, want, known)
			}
		}
	}
}

// TestPoolProperties: random operations, with restarts, on a pool that is always too small, against a model.
func TestPoolProperties(t *testing.T) {
	for seed := range uint64(20) {
		m := newModelled(t, filepath.Join(t.TempDir(), "names"))
		r := rand.New(rand.NewPCG(seed, 1))
		for range 20_000 {
			op := byte(1 + r.IntN(31))
			if r.IntN(2000) == 0 {
				op = 0
			}
			m.do(op, int(r.Uint32()))
		}
		m.checkAll()
		if m.refused == 0 || m.given == 0 || m.evicted == 0 || m.flows == 0 {
			t.Errorf("seed %d: %d given, %d refused, %d evicted, %d held: the test tests nothing",
				seed, m.given, m.refused, m.evicted, m.flows)
		}
		for len(m.holds) > 0 {
			m.release(0)
		}
		m.checkBounds()
	}
}

// FuzzPool does operations of three bytes each on a pool and its model.
func FuzzPool(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	long := make([]byte, 6000)
	for i := range long {
		long[i] = byte(r.Uint32())
	}
	f.Add(long)
	f.Add([]byte{20, 0, 0, 1, 0, 0, 0, 0, 0, 20, 0, 0})
	path := filepath.Join(f.TempDir(), "names")
	f.Fuzz(func(t *testing.T, ops []byte) {
		m := newModelled(t, path)
		restarts := 0
		for ; len(ops) >= 3; ops = ops[3:] {
			if ops[0]%32 == 0 {
				if restarts++; restarts > 2 { // each waits for the disk
					continue
				}
			}
			m.do(ops[0], int(ops[1])|int(ops[2])<<8)
		}
		m.checkAll()
	})
}
