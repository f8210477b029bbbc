package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/atomicfile"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

const envSaver = "DNS_TEST_SAVER" // set in a process that saves a pool to this path until it is killed

func TestMain(m *testing.M) {
	if path := os.Getenv(envSaver); path != "" {
		saveForever(path)
	}
	os.Exit(m.Run())
}

func fill(t testing.TB, p *Pool, from, to int) map[string]netip.Addr {
	t.Helper()
	all := map[string]netip.Addr{}
	for i := from; i < to; i++ {
		name := fmt.Sprintf("n%d.example", i)
		a, _, ok := p.Give([]byte(name))
		if !ok {
			t.Fatalf("%s has no address", name)
		}
		all[name] = a
	}
	return all
}

func has(t *testing.T, p *Pool, all map[string]netip.Addr) {
	t.Helper()
	for name, a := range all {
		if got, ok := p.AppendName(nil, a); !ok || string(got) != name {
			t.Fatalf("%v stands for %q, want %q", a, got, name)
		}
	}
}

func TestPoolFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "names")
	p, clock := newTestPool(t, "198.18.0.0/22", time.Second)
	if n, err := p.Load(path); n != 0 || err != nil {
		t.Fatalf("a file that is not there: %d, %v", n, err)
	}
	all := map[string]netip.Addr{}
	for i := range 768 {
		maps.Copy(all, fill(t, p, i, i+1))
		clock.t += time.Millisecond
	}
	clock.t += time.Minute
	first, _, _ := p.Give([]byte("n0.example"))   // is now the newest, and n1 the oldest
	second, _, _ := p.Give([]byte("new.example")) // takes the address of n1
	if err := p.Save(path); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file has mode %v", st.Mode())
	}
	delete(all, "n1.example")
	all["new.example"] = second

	q, clock := newTestPool(t, "198.18.0.0/22", time.Second)
	if n, err := q.Load(path); n != 768 || err != nil {
		t.Fatalf("loaded %d names: %v", n, err)
	}
	has(t, q, all)
	if _, _, ok := q.Give([]byte("too.early")); ok {
		t.Error("an address was taken from a name that may still be kept")
	}
	clock.t += 2 * time.Second
	if a, _, ok := q.Give([]byte("other.example")); !ok || a != all["n2.example"] {
		t.Errorf("a new name has %v, want that of the oldest, %v", a, all["n2.example"])
	}
	if got, _ := q.AppendName(nil, first); string(got) != "n0.example" {
		t.Errorf("%v stands for %q", first, got)
	}
	// A pool of other ranges has no use for it.
	r, _ := newTestPool(t, "198.18.0.0/23", time.Second)
	if n, err := r.Load(path); n != 0 || err != nil {
		t.Errorf("other ranges: %d, %v", n, err)
	}
}

// TestPoolFileWithHoles: entries that have no name stay free after a restart.
func TestPoolFileWithHoles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "names")
	p, clock := newTestPool(t, "198.18.0.0/22", time.Second)
	all := fill(t, p, 0, 20)
	clock.t += time.Minute
	p.mu.Lock()
	for range 5 {
		p.evict(clock.t)
	}
	p.mu.Unlock()
	if err := p.Save(path); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		delete(all, fmt.Sprintf("n%d.example", i))
	}
	q, _ := newTestPool(t, "198.18.0.0/22", time.Second)
	if n, err := q.Load(path); n != 15 || err != nil {
		t.Fatal(n, err)
	}
	for name, a := range fill(t, q, 100, 853) { // all that are left: 768 - 15
		if _, taken := all[name]; taken {
			t.Errorf("%s has %v", name, a)
		}
	}
	has(t, q, all)
}

func TestPoolFileDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "names")
	p, _ := newTestPool(t, "198.18.0.0/22", time.Second)
	fill(t, p, 0, 100)
	if err := p.Save(path); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		q, _ := newTestPool(t, "198.18.0.0/22", time.Second)
		if n, err := q.Load(path); err == nil || n != 0 || q.Stats().Names != 0 {
			t.Errorf("%s: %d names, %v", what, n, err)
		}
	}
	for cut := range len(good) {
		try(fmt.Sprintf("cut at %d", cut), good[:cut])
	}
	for _, at := range []int{0, 20, 60, len(good) / 2, len(good) - 2} {
		b := bytes.Clone(good)
		b[at] ^= 1
		if at == 20 { // the ranges: those of another pool are no damage
			continue
		}
		try(fmt.Sprintf("a bit at %d", at), b)
	}
	try("a name with a control character", bytes.Replace(good, []byte("n7.example"), []byte("n\x1b.example"), 1))
	try("a line without end", append(good[:60:60], bytes.Repeat([]byte{'a'}, 1<<20)...))
}

func saveForever(path string) {
	p, err := NewPool(
		PoolConfig{V4: netip.MustParsePrefix("198.18.0.0/15"), V6: netip.MustParsePrefix("fd00::/64"), TTL: time.Millisecond},
	)
	if err == nil {
		_, err = p.Load(path)
	}
	for i := 0; err == nil; i++ {
		for n := range 2000 {
			p.Give(fmt.Appendf(nil, "n%d-%d.example", i%5, n))
		}
		err = p.Save(path)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// TestPoolFileSurvivesKill: a process that saves is killed at many instants, and the file is always whole. What the saves left
// behind is removed by the next process that keeps the file, and nothing else is.
func TestPoolFileSurvivesKill(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "names")
	kills := 40
	if testing.Short() {
		kills = 10
	}
	for i := range kills {
		killSaver(t, path, time.Duration(i)*1700*time.Microsecond)
		p, err := NewPool(
			PoolConfig{V4: netip.MustParsePrefix("198.18.0.0/15"), V6: netip.MustParsePrefix("fd00::/64"), TTL: time.Second},
		)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := p.Load(path); err != nil || n < 2000 {
			t.Fatalf("after kill -9: %d names, %v", n, err)
		}
	}
	others := []string{"names", "names-1", ".names-", ".names-x", ".names-1x", ".names2-1"}
	for _, name := range others[1:] {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, ".names-7"), 0o700); err != nil {
		t.Fatal(err)
	}
	others = append(others, ".names-7")
	left, _ := filepath.Glob(filepath.Join(dir, ".names-[0-9]*[0-9]"))
	t.Logf("%d kills left %d unfinished files", kills, len(left)-1)
	atomicfile.RemoveUnfinished(path, time.Hour)
	if still, _ := filepath.Glob(filepath.Join(dir, ".names-[0-9]*[0-9]")); len(still) != len(left) {
		t.Errorf("%d of %d files that may be in use are gone", len(left)-len(still), len(left))
	}
	old := time.Now().Add(-leftoverAge)
	for _, f := range append(left, filepath.Join(dir, ".names-123")) {
		if err := os.WriteFile(f, nil, 0o600); err != nil && !errors.Is(err, syscall.EISDIR) {
			t.Fatal(err)
		}
		if err := os.Chtimes(f, old, old); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p, _ := newTestPool(t, "198.18.0.0/15", time.Second)
	p.KeepFile(ctx, path, slog.New(slog.DiscardHandler))
	var have []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		have = append(have, e.Name())
	}
	slices.Sort(others)
	if slices.Sort(have); !slices.Equal(have, others) {
		t.Errorf("there are %q, want %q", have, others)
	}
}

// killSaver starts a process that saves, and kills it a while after there is a file.
func killSaver(t *testing.T, path string, after time.Duration) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envSaver+"="+path)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if !testkit.Until(testkit.Patience, func() bool { _, err := os.Stat(path); return err == nil }) {
		t.Error("the process that saves made no file")
	}
	testkit.Pace(after)
	_ = cmd.Process.Kill()
	if _ = cmd.Wait(); said.Len() > 0 {
		t.Fatalf("the process that saves says %s", &said)
	}
}

// TestPoolFileFullDisk: a save that fails leaves the file as it was and nothing beside it, is said once, and is tried again.
func TestPoolFileFullDisk(t *testing.T) {
	dir := os.Getenv(envFullDisk)
	if dir == "" {
		onSmallDisk(t)
		return
	}
	path := filepath.Join(dir, "names")
	p, _ := newTestPool(t, "198.18.0.0/15", time.Second)
	all := fill(t, p, 0, 1000)
	if err := p.Save(path); err != nil {
		t.Fatal(err)
	}
	fill(t, p, 1000, 20_000)
	var warned atomic.Int32
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() {
		defer close(over)
		p.keepFile(ctx, path, 10*time.Millisecond, 10*time.Millisecond, slog.New(slog.NewTextHandler(writerFunc(func(b []byte) {
			if !bytes.Contains(b, []byte("no space left")) {
				t.Errorf("%s", b)
			}
			warned.Add(1)
		}), nil)))
	}()
	testkit.Settle(30*time.Millisecond, "keepFile waits")
	for range 20 { // each is a reason to save again
		p.Give([]byte("one.more"))
		testkit.Pace(10 * time.Millisecond)
	}
	cancel()
	<-over
	if n := warned.Load(); n != 1 {
		t.Errorf("it was said %d times", n)
	}
	q, _ := newTestPool(t, "198.18.0.0/15", time.Second)
	if n, err := q.Load(path); n != 1000 || err != nil {
		t.Errorf("the file has %d names: %v", n, err)
	}
	has(t, q, all)
	if e, err := os.ReadDir(dir); err != nil || len(e) != 1 {
		t.Errorf("there is %v beside it", e)
	}
}

// envFullDisk is the directory of the small disk, in the environment of the process that has it.
const envFullDisk = "DNS_TEST_FULL_DISK"

// onSmallDisk runs TestPoolFileFullDisk in a process that has a small disk.
func onSmallDisk(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(
		"unshare",
		"-rm",
		"sh",
		"-c",
		`mount -t tmpfs -o size=64k none "$`+envFullDisk+`" && exec "$0" -test.run '^TestPoolFileFullDisk$' -test.v`,
		self,
	)
	cmd.Env = append(os.Environ(), envFullDisk+"="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if strings.Contains(string(out), "unshare failed") || strings.Contains(string(out), "permission denied") {
		t.Skipf("cannot make a small disk: %s", out)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Fatalf("%v\n%s", err, out)
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) { f(b); return len(b), nil }

func TestPoolKeepsItsFile(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "names")
	p, _ := newTestPool(t, "198.18.0.0/15", time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() { defer close(over); p.keepFile(ctx, path, time.Hour, time.Hour, slog.New(slog.DiscardHandler)) }()
	testkit.Settle(10*time.Millisecond, "keepFile waits")
	all := fill(t, p, 0, 10)
	cancel()
	<-over
	q, _ := newTestPool(t, "198.18.0.0/15", time.Second)
	if n, err := q.Load(path); n != 10 || err != nil {
		t.Fatal(n, err)
	}
	has(t, q, all)
}

// FuzzPoolFile loads what the fuzzer wrote, as it is and with the right last line. The pool is empty then, or one that keeps its
// promises: each name has an address of its own, and the next file has the same.
func FuzzPoolFile(f *testing.F) {
	head := fmt.Sprintf("%s 198.18.0.0/22 %v\n", fileMagic, flow.Pool6)
	f.Add([]byte(head + "0 10 a.example\n767 11 b.example\n"))
	f.Add([]byte(head + "5 10 a.example\n5 11 b.example\n6 12 a.example\n768 1 c.example\n4294967295 -1 d.example\n"))
	f.Add([]byte(head + "5 10 a.example\n5 11 b.example\n"))
	f.Add([]byte(head + "5 10 a.example\n6 11 a.example\n"))
	f.Add([]byte(head))
	f.Add([]byte(head + "1 1 " + strings.Repeat("a.", 127) + "\n"))
	f.Add([]byte("viasocks-names 1 198.18.0.0/15 fd00::/64\n1 1 a\n"))
	path := filepath.Join(f.TempDir(), "names")
	f.Fuzz(func(t *testing.T, b []byte) {
		lines := bytes.Count(b, []byte("\n"))
		for _, tail := range []string{"", fmt.Sprintf("end %d %08x\n", max(lines-1, 0), crc32.ChecksumIEEE(b))} {
			if err := os.WriteFile(path, append(bytes.Clone(b), tail...), 0o600); err != nil {
				t.Fatal(err)
			}
			p, _ := newTestPool(t, "198.18.0.0/22", time.Second)
			n, err := p.Load(path)
			if n != p.Stats().Names || n > lines || err != nil && n > 0 {
				t.Fatalf("%d of %d names, %v; %+v", n, lines, err, p.Stats())
			}
			if n > 0 {
				checkLoaded(t, p, path)
			}
		}
	})
}

// checkLoaded compares a pool with itself after another restart. Then it gives out all that is left.
func checkLoaded(t *testing.T, p *Pool, path string) {
	t.Helper()
	if err := p.writeTo(path); err != nil {
		t.Fatal(err)
	}
	q, _ := newTestPool(t, "198.18.0.0/22", time.Second)
	if n, err := q.Load(path); err != nil || n != p.Stats().Names {
		t.Fatalf("then %d of %d names, %v", n, p.Stats().Names, err)
	}
	all := make(map[string]netip.Addr)
	for i := range p.size {
		a := p.addr4(i)
		name, ok := p.AppendName(nil, a)
		if !ok {
			continue
		}
		if !isHost(name) {
			t.Fatalf("%v stands for %q", a, name)
		}
		if before, twice := all[string(name)]; twice {
			t.Fatalf("%q has %v and %v", name, before, a)
		}
		all[string(name)] = a
		for _, pool := range []*Pool{p, q} {
			if got, _, ok := pool.Give(name); !ok || got != a {
				t.Fatalf("%q had %v and has %v", name, a, got)
			}
		}
	}
	for i := range int(p.size) - len(all) {
		name := fmt.Appendf(nil, "fill-%d.invalid", i)
		if a, _, ok := q.Give(name); !ok && all[string(name)] == (netip.Addr{}) {
			t.Fatalf("no address for %s, name %d of %d, %v", name, len(all)+i, p.size, a)
		}
	}
	has(t, q, all)
}

// writeTo is Save without waiting for the disk.
func (p *Pool) writeTo(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return p.SaveTo(f)
}
