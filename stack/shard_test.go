package stack

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/stacktest"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// shardHandler notes which shard each app port came to, and echoes datagrams.
type shardHandler struct {
	*echo
	t     *testing.T
	s     *Stack
	calls [maxShards]atomic.Int32 // under way
	mu    sync.Mutex
	of    map[uint16]int
	got   map[netip.AddrPort][][]byte
	gone  map[uint16]int
	mute  atomic.Bool // no echo: the flows stay in the queues of their hash
}

func (h *shardHandler) enter(shard int, port uint16) (leave func()) {
	if h.calls[shard].Add(1) != 1 {
		h.t.Errorf("two calls for shard %d at once", shard)
	}
	h.mu.Lock()
	if had, ok := h.of[port]; ok && had != shard {
		h.t.Errorf("port %d came to shard %d, and now to %d", port, had, shard)
	}
	h.of[port] = shard
	h.mu.Unlock()
	return func() { h.calls[shard].Add(-1) }
}

func (h *shardHandler) HandleStream(shard int, r flow.StreamRequest) {
	defer h.enter(shard, r.Flow().Src.Port())()
	h.echo.HandleStream(shard, r)
}

func (h *shardHandler) HandlePackets(shard int, ps []flow.Packet) {
	for _, p := range ps {
		leave := h.enter(shard, p.Src.Port())
		h.mu.Lock()
		h.got[p.Src] = append(h.got[p.Src], bytes.Clone(p.Payload))
		h.mu.Unlock()
		leave()
	}
	if !h.mute.Load() {
		echoUDP(h.s.PacketWriter(shard), ps)
	}
}

func (h *shardHandler) HandleUnreachable(shard int, app, _ netip.AddrPort) {
	defer h.enter(shard, app.Port())()
	h.mu.Lock()
	h.gone[app.Port()] = shard
	h.mu.Unlock()
}

func newShardHandler(t *testing.T, e *echo) *shardHandler {
	return &shardHandler{echo: e, t: t, of: map[uint16]int{}, got: map[netip.AddrPort][][]byte{}, gone: map[uint16]int{}}
}

// TestShardsTCP: connections of many ports go through stacks of several shards, also when the kernel forgets in between which
// queue is theirs, and each port has one shard.
func TestShardsTCP(t *testing.T) {
	for _, n := range []int{2, 3, maxShards} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			e := newEcho()
			defer e.stop()
			h := newShardHandler(t, e)
			p := newPair(t, offAll, Config{Handler: h, Shards: n})
			if p.st.Shards() != n {
				t.Fatalf("%d shards", p.st.Shards())
			}
			const conns = 60
			for i := range conns {
				dst := srv4
				if i%2 == 1 {
					dst = srv6
				}
				c := p.mustDial(dst)
				p.dev.Forget()
				data := bytes.Repeat([]byte{byte(i)}, 100_000)
				go c.Write(data)
				b := make([]byte, len(data))
				if _, err := io.ReadFull(c, b); err != nil || !bytes.Equal(b, data) {
					t.Fatalf("connection %d: %v", i, err)
				}
			}
			used := map[int]bool{}
			for port, shard := range h.of {
				used[shard] = true
				if p.st.home(port) != shard {
					t.Errorf("port %d came to shard %d and belongs to %d", port, shard, p.st.home(port))
				}
			}
			st := p.st.Stats()
			if len(used) < min(n, 8) || st.HandedOver == 0 || st.Accepted != conns || st.Streams != conns ||
				st.DroppedHandover != 0 {
				t.Errorf("%d shards used; %+v", len(used), st)
			}
			t.Logf("%d of %d frames were handed over", st.HandedOver, st.FramesIn)
			p.st.ResetAll()
			if st = p.st.Stats(); registered(p.st) != 0 {
				t.Errorf("%d endpoints are left: %+v", registered(p.st), st)
			}
		})
	}
}

// TestShardsUDP: datagrams come to their port's shard in order, whatever queue they come by, whole or in fragments; and so does
// the app's word that a port is closed.
func TestShardsUDP(t *testing.T) {
	testkit.CheckLeaks(t)
	here, there := tuntest.Pipe(1500, offAll)
	h := newShardHandler(t, nil)
	s, err := New(Config{Device: here, Handler: h, Shards: 4})
	if err != nil {
		t.Fatal(err)
	}
	h.s = s
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	defer func() { cancel(); <-ran; there.Close() }()
	a := shardApp{t, there, h}
	const ports, each = 50, 8
	for port := range uint16(ports) {
		a.sendInTurn(app4.Addr(), far4, port, each)
		a.sendInTurn(app6.Addr(), far6, port, each)
	}
	a.sendRun(200)
	a.refuse(ports)
	st := s.Stats()
	if st.UDP.In != 2*ports*each+200 || st.HandedOver == 0 || st.DroppedHandover != 0 || st.UDP.InReassembled != 2*ports*each/4 {
		t.Errorf("%+v", st)
	}
}

// shardApp is the kernel of an app whose datagrams come to a shardHandler.
type shardApp struct {
	t   *testing.T
	dev *tuntest.Device
	h   *shardHandler
}

func (a *shardApp) send(fs ...stacktest.Frame) {
	a.t.Helper()
	for _, f := range fs {
		if err := a.dev.Write(&f.Header, [][]byte{f.Data}); err != nil {
			a.t.Fatal(err)
		}
	}
}

// sendInTurn sends each datagram of a port when the one before has come.
func (a *shardApp) sendInTurn(app netip.Addr, dst netip.AddrPort, port uint16, each int) {
	a.t.Helper()
	src := netip.AddrPortFrom(app, 5000+port)
	for i := range each {
		if i == each/2 {
			a.dev.Forget()
		}
		d := stacktest.Datagram{Src: src, Dst: dst, Payload: []byte{byte(i)}}.Frame()
		if i%4 == 3 { // in pieces
			d = stacktest.Datagram{Src: src, Dst: dst, Payload: bytes.Repeat([]byte{byte(i)}, 3000)}.Frame()
			a.send(d.Fragments(1400, uint32(port)<<8|uint32(i))...)
		} else {
			a.send(d)
		}
		a.await("a datagram", func() bool { return len(a.h.got[src]) == i+1 })
		a.h.mu.Lock()
		if b := a.h.got[src][i]; b[0] != byte(i) || len(b) != 1+2999*(i%4/3) {
			a.t.Fatalf("%v: datagram %d is %d of %d bytes", src, i, b[0], len(b))
		}
		a.h.mu.Unlock()
	}
}

// await waits until something is true of the handler.
func (a *shardApp) await(what string, ok func() bool) {
	a.t.Helper()
	testkit.Eventually(a.t, what, func() bool { a.h.mu.Lock(); defer a.h.mu.Unlock(); return ok() })
}

// sendRun sends n datagrams without waiting. They stay in order while nothing is written to the run: an answer in between moves
// the flow to another queue, whose reader may overtake the one that still has the frames before.
func (a *shardApp) sendRun(n int) {
	a.t.Helper()
	a.h.mute.Store(true)
	src := netip.AddrPortFrom(app4.Addr(), 4000)
	a.dev.Forget()
	for i := range n {
		a.send(stacktest.Datagram{Src: src, Dst: far4, Payload: []byte{byte(i)}}.Frame())
	}
	a.await("the run", func() bool { return len(a.h.got[src]) == n })
	for i, b := range a.h.got[src] {
		if b[0] != byte(i) && !a.t.Failed() {
			a.t.Errorf("datagram %d is %d", i, b[0])
		}
	}
}

// refuse answers the writer's frames to each of the ports as the app's kernel does when the port is closed.
func (a *shardApp) refuse(ports uint16) {
	a.t.Helper()
	for port := range ports {
		app := netip.AddrPortFrom(app4.Addr(), 5000+port)
		q := stacktest.Datagram{Src: far4, Dst: app, Payload: []byte("y")}.Frame()
		b, ok := appendUnreachable(nil, q.Data, flow.RefusePort)
		if !ok {
			a.t.Fatal("no ICMP error")
		}
		if err := a.dev.Write(nil, [][]byte{b}); err != nil {
			a.t.Fatal(err)
		}
	}
	a.await("the ICMP errors", func() bool { return len(a.h.gone) == int(ports) })
}

// TestInbox: what is over an inbox's bounds is dropped and counted, and the buffers are the pools'.
func TestInbox(t *testing.T) {
	wakes := 0
	from, to := &shard{}, &shard{dev: wakeCounter{&wakes}}
	small, big := make([]byte, 100), make([]byte, 64<<10)
	for range inboxFrames + 10 {
		from.hand(to, &tun.Header{Flags: 7}, small)
	}
	if fs := to.inbox.take(nil); len(fs) != inboxFrames || wakes != 1 || len(*fs[0].buf) != 100 || fs[0].h.Flags != 7 {
		t.Errorf("%d frames, %d wakes", len(fs), wakes)
	}
	if to.inbox.take(nil) != nil {
		t.Error("they are given twice")
	}
	for range 100 {
		from.hand(to, &tun.Header{}, big[:1000], big[1000:])
	}
	if fs := to.inbox.take(nil); len(fs) != inboxBytes/len(big) || wakes != 2 || len(*fs[0].buf) != len(big) {
		t.Errorf("%d big frames, %d wakes", len(fs), wakes)
	}
	from.hand(to, &tun.Header{}, make([]byte, tun.MaxFrame+1))
	if n := from.stats.DroppedHandover.Load(); n != 10+100-uint64(inboxBytes/len(big))+1 {
		t.Errorf("%d dropped", n)
	}
	spare := make([]handed, 0, 4)
	if n := testing.AllocsPerRun(1000, func() {
		from.hand(to, &tun.Header{}, small)
		fs := to.inbox.take(spare)
		frameBuf(cap(*fs[0].buf)).Put(fs[0].buf)
		spare = fs
	}); n > 0.5 {
		t.Errorf("%v allocations for a frame", n)
	}
}

type wakeCounter struct{ n *int }

func (w wakeCounter) Wake()                                     { *w.n++ }
func (wakeCounter) Name() string                                { return "" }
func (wakeCounter) MTU() int                                    { return 1500 }
func (wakeCounter) Offload() tun.Offload                        { return offAll }
func (wakeCounter) Read(*tun.Header, []byte, bool) (int, error) { return 0, os.ErrClosed }
func (wakeCounter) Write(*tun.Header, [][]byte) error           { return nil }
func (wakeCounter) Close() error                                { return nil }

// TestShardsBudget: the budgets are those of all shards together.
func TestShardsBudget(t *testing.T) {
	r := newRaw(t, Config{Shards: 4, Limits: Limits{Pending: 20, PendingPerDest: 5}})
	for i := range 100 {
		dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i % 10)}), 80)
		r.send(tun.Header{}, segment(netip.AddrPortFrom(appIP4, uint16(3000+i)), dst, 1, 0, header.TCPFlagSyn, nil, nil))
	}
	testkit.Eventually(t, "all SYNs", func() bool { return r.s.Stats().FramesIn >= 100 })
	testkit.Eventually(t, "the budget to be used", func() bool {
		st := r.s.Stats()
		return st.SYNs == 20 && st.OverBudget+st.OverDestBudget == 80 && st.Pending == 20
	})
	one := netip.MustParseAddrPort("198.51.100.1:80")
	for range 20 {
		r.request().Reject(flow.RefuseSilent)
	}
	for i := range 10 {
		r.send(tun.Header{}, segment(netip.AddrPortFrom(appIP4, uint16(4000+i)), one, 1, 0, header.TCPFlagSyn, nil, nil))
	}
	testkit.Eventually(t, "the destination's budget to be used", func() bool {
		st := r.s.Stats()
		return st.SYNs == 25 && st.OverDestBudget >= 5 && st.Pending == 5
	})
}

// FuzzParseIP: no bytes make parseIP look or point outside of them, and the port is the one that lies there.
func FuzzParseIP(f *testing.F) {
	for _, c := range rareSYNs() {
		for _, b := range c.frames {
			f.Add(b)
			f.Add(b[:len(b)/2])
		}
	}
	s6 := netip.AddrPortFrom(appIP6, 1)
	syn := segment(s6, srv6, 1, 0, header.TCPFlagSyn, nil, nil)
	for _, next := range []byte{protoHopByHop, protoRouting, protoDestOpts, protoFragment} {
		f.Add(withExt(syn, next, protoTCP, 0, 1, 4, 0, 0, 0, 0))
		f.Add(withExt(syn, next, next, 0xff, 0xff, 0xff, 0, 0, 0, 0))
	}
	for _, ends := range [][2]netip.AddrPort{{app4, far4}, {app6, far6}} {
		q := stacktest.Datagram{Src: ends[1], Dst: ends[0], Payload: []byte("y")}.Frame()
		if b, ok := appendUnreachable(nil, q.Data, flow.RefusePort); ok {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := parseIP(b)
		if !ok {
			return
		}
		least := ip4HeaderLen
		if p.v6 {
			least = ip6HeaderLen
		}
		if p.off < least || p.end < p.off || p.end > len(b) || p.later && !p.frag || p.v6 != (b[0]>>4 == 6) {
			t.Fatalf("%+v of % x", p, b)
		}
		if port, ok := appPort(b, &p); ok && (p.frag || !bytes.Contains(b[p.off:p.end], []byte{byte(port >> 8), byte(port)})) {
			t.Fatalf("port %d of %+v", port, p)
		}
		if again, ok := parseIP(b[:p.end]); !ok || again != p {
			t.Fatalf("%+v with what follows the packet, %+v without", p, again)
		}
	})
}

// BenchmarkShards reads frames of many flows, in memory, by one reader or more: TCP segments, each of which passes gVisor's
// demultiplexer and the pending table. Each part of the device has its frames ready, so that the device has no lock.
// wait-ns/op is how long goroutines waited for mutexes.
func BenchmarkShards(b *testing.B) {
	for _, shards := range []int{1, 2} {
		for _, procs := range []int{1, 2} {
			b.Run(fmt.Sprintf("shards=%d/procs=%d", shards, procs), func(b *testing.B) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
				d := &readyDevice{left: int64(b.N), shards: shards}
				s, err := New(Config{Device: d, Handler: new(testHandler), Shards: shards})
				if err != nil {
					b.Fatal(err)
				}
				for port := uint16(1024); port < 1024+512; port++ {
					p := d.parts[s.home(port)]
					p.frames = append(
						p.frames,
						segment(netip.AddrPortFrom(appIP4, port), srv4, 1, 1, header.TCPFlagRst, nil, nil),
					)
				}
				before := mutexWait()
				start := time.Now()
				b.ResetTimer()
				_ = s.Run(context.Background()) // until all are read
				b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "frames/s")
				b.ReportMetric(float64(mutexWait()-before)/float64(b.N), "wait-ns/op")
			})
		}
	}
}

// mutexWait is how long goroutines have waited for mutexes.
func mutexWait() time.Duration {
	s := []metrics.Sample{{Name: "/sync/mutex/wait/total:seconds"}}
	metrics.Read(s)
	return time.Duration(s[0].Value.Float64() * float64(time.Second))
}

// readyDevice is parts that have frames for their shard until all together have given as many as wanted.
type readyDevice struct {
	wakeCounter
	left   int64
	shards int
	parts  []*readyPart
}

type readyPart struct {
	wakeCounter
	frames   [][]byte
	at, left int
}

func (d *readyDevice) Divide(n int) ([]tun.Part, error) {
	var all []tun.Part
	for range n {
		p := &readyPart{wakeCounter: wakeCounter{new(int)}, left: int(d.left)/n + 1}
		d.parts = append(d.parts, p)
		all = append(all, p)
	}
	return all, nil
}

func (p *readyPart) Read(h *tun.Header, b []byte, _ bool) (int, error) {
	if p.left--; p.left < 0 {
		return 0, os.ErrClosed
	}
	p.at = (p.at + 1) % len(p.frames)
	*h = tun.Header{Flags: tun.DataValid}
	return copy(b, p.frames[p.at]), nil
}
