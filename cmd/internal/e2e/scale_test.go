package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// silentConn is a far end without a descriptor: it neither sends nor reads, until it is closed.
type silentConn struct {
	net.Conn // of a net.Pipe, for addresses and deadlines
	closed   chan struct{}
	once     sync.Once
}

func newSilentConn() *silentConn {
	c, _ := net.Pipe()
	return &silentConn{Conn: c, closed: make(chan struct{})}
}

func (c *silentConn) Read([]byte) (int, error)  { <-c.closed; return 0, net.ErrClosed }
func (c *silentConn) Write([]byte) (int, error) { <-c.closed; return 0, net.ErrClosed }
func (c *silentConn) CloseWrite() error         { return c.Close() }
func (c *silentConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// remains is how much memory may stay in use after 9,500 connections, a twentieth of theirs: the runtime's own, which are spans,
// mark bits and timers for the largest heap that there was. A ratio to before would be stricter the less a fresh run takes.
const remains = 3 << 20

// TestManyIdle: 9,500 idle connections, as many as the descriptors of this process allow: memory for each is small,
// nothing of ours wakes, and all comes back.
func TestManyIdle(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	needWorld(t)
	n := manyFiles(t)
	proxy := listenSOCKS(t, sockstest.WithDial(func(context.Context, sockstest.Addr) (net.Conn, error) {
		return newSilentConn(), nil
	}))
	a := startApp(t, "--proxy", proxy.URL(), "--log-level", "debug")
	dst := netip.AddrPortFrom(netip.MustParseAddr(world4), 80)
	// Before is a program that has worked: after a hundred connections the code that carries them is in memory, and so is
	// what the collector needs, 0.8 MB in all; and their memory has come back.
	warmUp(t, a, proxy, dst)
	rss0, fds0 := a.rss(), a.fds()

	start := time.Now()
	fds := connectMany(t, a, dst, n)
	took := time.Since(start)
	testkit.Pace(8 * time.Second) // the daemon looks every 5 s
	rss1, fds1 := a.rss(), a.fds()
	idleCPU := calmestCPU(a)
	closeMany(t, proxy, fds)
	testkit.EventuallyIn(t, 4*testkit.Patience, "every descriptor is given back", func() bool { return a.fds() <= fds0+2 })
	// Memory comes back as the collector and the scavenger get to it.
	rss2 := a.shrinks(rss0 + remains*3/4)
	t.Logf(
		"%d idle connections in %v: RSS %d KiB before, %d KiB with them (%.1f KiB each), %d KiB after (%.2f times); "+
			"descriptors %d, %d, %d; CPU while idle %v in 2 s; goroutines, whenever memory was given back: %v",
		n,
		took.Round(time.Millisecond),
		rss0>>10,
		rss1>>10,
		float64(rss1-rss0)/1024/float64(n),
		rss2>>10,
		float64(rss2)/float64(rss0),
		fds0,
		fds1,
		a.fds(),
		idleCPU,
		a.goroutines(),
	)
	if raceEnabled {
		return // the race detector's own memory
	}
	if each := (rss1 - rss0) / n; each > 16<<10 {
		t.Errorf("an idle connection costs %d bytes", each)
	}
	for _, g := range a.goroutines() {
		if g > 60 {
			t.Errorf("%d goroutines: some belong to idle connections", g)
		}
	}
	if rss2 > rss0+remains {
		t.Errorf("%d KiB remain of %d KiB, %d KiB before", rss2>>10, rss1>>10, rss0>>10)
	}
	if idleCPU > 100*time.Millisecond {
		t.Errorf("%d idle connections cost %v of CPU in 2 s", n, idleCPU)
	}
}

// shrinks waits until viasocks has no more memory than most, for half a minute, and returns how much it has. The race detector
// gives no memory back: nobody waits for that.
func (a *app) shrinks(most int) (rss int) {
	rss = a.rss()
	if !raceEnabled {
		testkit.Until(30*time.Second, func() bool { testkit.Pace(200 * time.Millisecond); rss = a.rss(); return rss <= most })
	}
	return rss
}

// manyFiles gives this process all descriptors that it may have, and is how many connections that allows.
func manyFiles(t *testing.T) int {
	t.Helper()
	n := 9500
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	lim.Cur = lim.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	if most := int(lim.Max)/2 - 500; most < n {
		n = most // two descriptors for a connection: the app's socket and the proxy's
	}
	if raceEnabled {
		n = min(n, 1500)
	}
	return n
}

// warmUp makes a hundred connections, and waits until their memory has come back.
func warmUp(t *testing.T, a *app, proxy *sockstest.Server, dst netip.AddrPort) {
	t.Helper()
	var warm []int
	for range 100 {
		fd, _, err := a.connect(dst)
		if err != nil {
			t.Fatal(err)
		}
		warm = append(warm, fd)
	}
	for _, fd := range warm {
		unix.Close(fd)
	}
	testkit.EventuallyIn(t, 4*testkit.Patience, "the first connections end", func() bool { return proxy.Stats().Open == 0 })
	testkit.EventuallyIn(t, 4*testkit.Patience, "their memory comes back", func() bool { return len(a.goroutines()) > 0 })
	testkit.Settle(500*time.Millisecond, "the first memory has come back")
}

func connectMany(t *testing.T, a *app, dst netip.AddrPort, n int) []int {
	t.Helper()
	fds := make([]int, n)
	var failed atomic.Int64
	var wg sync.WaitGroup
	const dialers = 32
	for d := range dialers {
		wg.Go(func() {
			for i := d; i < n; i += dialers {
				var err error
				if fds[i], _, err = a.connect(dst); err != nil {
					failed.Add(1)
					t.Log(err)
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() > 0 {
		t.Fatalf("%d of %d connections failed", failed.Load(), n)
	}
	return fds
}

// calmestCPU is what two seconds cost while nothing is to do. The collector may be at work just then: the calmest of a few
// looks counts.
func calmestCPU(a *app) time.Duration {
	idleCPU := time.Hour
	for range 5 {
		cpu0 := a.cpu()
		testkit.Pace(2 * time.Second)
		if idleCPU = min(idleCPU, a.cpu()-cpu0); idleCPU <= 100*time.Millisecond {
			break
		}
	}
	return idleCPU
}

// closeMany closes connections by and by. FINs beyond the TUN's queue of 500 are lost, and sent again after twice the time each
// time: on a busy machine that took most of a minute, and the kernel gives up after eight.
func closeMany(t *testing.T, proxy *sockstest.Server, fds []int) {
	t.Helper()
	for i, fd := range fds {
		unix.Close(fd)
		if i%100 == 99 {
			testkit.EventuallyIn(t, 4*testkit.Patience, "the connections to the server end", func() bool {
				return proxy.Stats().Open <= len(fds)-i+300
			})
		}
	}
	testkit.EventuallyIn(t, 4*testkit.Patience, "every server connection ends", func() bool { return proxy.Stats().Open == 0 })
}

// TestUnread: 200 connections whose program never reads while the far end floods: bounded memory, given back.
func TestUnread(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	const n = 200
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--log-level", "debug")
	l, dst := listenTCP(t, world4)
	go func() {
		fill := make([]byte, 256<<10)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for {
					if _, err := c.Write(fill); err != nil {
						return
					}
				}
			}()
		}
	}()
	fd, _, err := a.connect(dst)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	testkit.Settle(500*time.Millisecond, "the first memory has come back")
	rss0, fds0 := a.rss(), a.fds()
	fds := make([]int, n)
	for i := range fds {
		if fds[i], _, err = a.connect(dst); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Pace(3 * time.Second) // so long they are not read
	rss1, fds1 := a.rss(), a.fds()
	// The others are not starved by them.
	start := time.Now()
	app, far := pair(t, a, world4)
	app.Write([]byte("x"))
	far.SetReadDeadline(time.Now().Add(testkit.Patience))
	if _, err := far.Read(make([]byte, 1)); err != nil {
		t.Error("a new connection beside them:", err)
	}
	beside := time.Since(start)
	app.Close()
	far.Close()
	for _, fd := range fds {
		unix.Close(fd)
	}
	testkit.EventuallyIn(t, 4*testkit.Patience, "every descriptor is given back", func() bool { return a.fds() <= fds0+2 })
	rss2 := a.shrinks(rss0 * 13 / 10)
	t.Logf(
		"%d unread connections: RSS %d KiB before, %d KiB during (%d KiB each), %d KiB after; descriptors %d, %d, %d; "+
			"a new connection and a byte beside them in %v; goroutines after: %v",
		n,
		rss0>>10,
		rss1>>10,
		(rss1-rss0)>>10/n,
		rss2>>10,
		fds0,
		fds1,
		a.fds(),
		beside.Round(time.Millisecond),
		a.goroutines(),
	)
	if raceEnabled {
		return
	}
	if each := (rss1 - rss0) / n; each > 2<<20 {
		t.Errorf("an unread connection costs %d bytes", each)
	}
}

// TestTransferMemory: after 1 GB in bulk, both ways and by eight connections at once, memory is what it was.
func TestTransferMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("it measures")
	}
	const conns, each = 8, 64 << 20
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--log-level", "debug")
	app, far := pair(t, a, world4) // warm
	app.Close()
	far.Close()
	testkit.Settle(500*time.Millisecond, "the first memory has come back")
	rss0 := a.rss()
	var peak atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	var watch, wg sync.WaitGroup
	watch.Go(func() {
		for ctx.Err() == nil {
			peak.Store(max(peak.Load(), int64(a.rss())))
			testkit.Pace(20 * time.Millisecond)
		}
	})
	move := func(from, to *net.TCPConn) {
		wg.Go(func() {
			b := make([]byte, 256<<10)
			for n := 0; n < each; n += len(b) {
				if _, err := from.Write(b); err != nil {
					t.Error(err)
					return
				}
			}
			from.CloseWrite()
		})
		wg.Go(func() {
			if n, err := io.Copy(io.Discard, struct{ io.Reader }{to}); n != each || err != nil {
				t.Errorf("%d of %d bytes: %v", n, each, err)
			}
		})
	}
	for range conns {
		app, far := pair(t, a, world4)
		move(app, far)
		move(far, app)
	}
	wg.Wait()
	cancel()
	watch.Wait()
	rss1 := a.shrinks(rss0 * 13 / 10)
	t.Logf(
		"RSS %d KiB before, %d KiB at most, %d KiB after (%.2f times)",
		rss0>>10,
		peak.Load()>>10,
		rss1>>10,
		float64(rss1)/float64(rss0),
	)
	if rss1 > rss0*13/10 {
		t.Errorf("%d KiB remain of %d KiB before", rss1>>10, rss0>>10)
	}
}

// TestDeadPeers: a swarm's dead peers, whose dials hang at the proxy, do not keep others from connecting.
func TestDeadPeers(t *testing.T) {
	const silentPort = 6881
	proxy := listenSOCKS(t)
	proxy.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Dst.Port == silentPort {
			return sockstest.Silence()
		}
		return sockstest.Fault{}
	})
	a := startApp(t, "--proxy", proxy.URL(), "--handshake-timeout", "20s")
	var fds []int
	for i := range 1000 {
		addr := netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 250)})
		fd := a.socket(unix.AF_INET, unix.SOCK_STREAM)
		defer unix.Close(fd)
		if err := unix.SetNonblock(fd, true); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, sockaddr(netip.AddrPortFrom(addr, silentPort))); !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	_, dst := listenTCP(t, world4)
	limit := 900 * time.Millisecond
	if raceEnabled {
		limit = 4 * time.Second // a burst of 1,000 SYNs may then overflow the TUN's queue: a SYN is sent again after 1 s
	}
	for try := 1; ; try++ { // the machine may be what is slow, but not each time
		start := time.Now()
		a.tcp(dst)
		took := time.Since(start).Round(time.Millisecond)
		t.Logf("with %d dials pending a connection took %v", len(fds), took)
		if took <= limit {
			break
		}
		if try == 5 {
			t.Fatal("none was in time")
		}
	}
}
