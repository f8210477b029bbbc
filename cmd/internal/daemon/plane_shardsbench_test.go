package daemon

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/metrics"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/tun"
)

// BenchmarkShards is the whole path of a frame but for the kernel: a device in memory, the stack, the router and an upstream that
// answers on the spot. udp: each op is a datagram of one of 256 sockets and its answer. syn: each op is a connection to an
// address of its own, which the upstream refuses, and its RST. The app has one frame under way for each of its ports, and the
// device sends the next one by the queue that the answer came from, as the kernel does.
//
// wait-ns/op is how long goroutines waited for mutexes. Run it with -mutexprofile to see for which.
func BenchmarkShards(b *testing.B) {
	for _, kind := range []string{"udp", "syn"} {
		for _, shards := range []int{1, 2} {
			for _, procs := range []int{1, 2} {
				b.Run(fmt.Sprintf("%s/shards=%d/procs=%d", kind, shards, procs), func(b *testing.B) {
					defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
					benchmarkShards(b, kind, shards)
				})
			}
		}
	}
}

func benchmarkShards(b *testing.B, kind string, shards int) {
	d := &busyDevice{syn: kind == "syn", total: int64(b.N), begin: make(chan struct{})}
	h := &handler{}
	s, err := stack.New(stack.Config{Device: d, Handler: h, Shards: shards})
	if err != nil {
		b.Fatal(err)
	}
	var loops []*relay.Loop
	var ran sync.WaitGroup
	for range shards {
		l, err := relay.NewLoop(relay.Config{})
		if err != nil {
			b.Fatal(err)
		}
		loops = append(loops, l)
		ran.Go(func() { _ = l.Run(context.Background()) })
	}
	r, err := route.New(route.Config{Upstreams: []route.Upstream{onTheSpot{}}, Default: "p", Loops: loops, Shards: s.Shards()})
	if err != nil {
		b.Fatal(err)
	}
	r.Attach(s.PacketWriter)
	h.Router = r
	ran.Go(func() { _ = r.Run(context.Background()) })
	ran.Go(func() { _ = s.Run(context.Background()) })
	d.warm.Wait()
	handed, waited, start := s.Stats().HandedOver, mutexWait(), time.Now()
	b.ResetTimer()
	close(d.begin)
	d.over.Wait()
	took := time.Since(start)
	b.StopTimer()
	b.ReportMetric(float64(b.N)/took.Seconds(), "frames/s")
	b.ReportMetric(float64(mutexWait()-waited)/float64(b.N), "wait-ns/op")
	b.ReportMetric(float64(s.Stats().HandedOver-handed)/float64(b.N), "handed-over/op")
	r.Close()
	s.Close()
	for _, l := range loops {
		l.Close()
	}
	ran.Wait()
}

// mutexWait is how long goroutines have waited for mutexes.
func mutexWait() time.Duration {
	s := []metrics.Sample{{Name: "/sync/mutex/wait/total:seconds"}}
	metrics.Read(s)
	return time.Duration(s[0].Value.Float64() * float64(time.Second))
}

// onTheSpot is an upstream that refuses connections and echoes datagrams, all on the caller's goroutine.
type onTheSpot struct{}

func (onTheSpot) Name() string { return "p" }

func (onTheSpot) DialStream(_ context.Context, _ *relay.Loop, _ route.Dest, done func(loop.Socket, error)) {
	done(loop.NoSocket, syscall.ECONNREFUSED)
}

func (onTheSpot) OpenPackets(_ context.Context, _ *relay.Loop, sink func([]flow.Packet), done func(relay.PacketLink, error),
	_ func(error)) {
	done(&echoLink{sink: sink}, nil)
}

type echoLink struct {
	sink func([]flow.Packet)
	back [1]flow.Packet
}

func (l *echoLink) Send(ps []flow.Packet) (int, error) {
	for i := range ps {
		l.back[0] = flow.Packet{Src: ps[i].Dst, Payload: ps[i].Payload}
		l.sink(l.back[:])
	}
	return len(ps), nil
}

func (*echoLink) Close() error           { return nil }
func (*echoLink) Stats() relay.LinkStats { return relay.LinkStats{} }
func (*echoLink) Overflowed() uint64     { return 0 }

const (
	busyPorts = 256
	firstPort = 20000
	busyWarm  = 20 // answers to each port before the clock starts
)

// busyDevice is a TUN in memory whose app sends the next frame of a port when the answer to the last one came. Each part has its
// share of the ports and of the answers, so that the parts have nothing in common.
type busyDevice struct {
	syn   bool
	total int64
	parts []*busyPart
	warm  sync.WaitGroup // until all flows have found their queue
	begin chan struct{}  // closed when the clock runs
	over  sync.WaitGroup // until all parts have their answers
	once  sync.Once
}

type busyPart struct {
	*busyDevice
	mu       sync.Mutex
	more     sync.Cond
	ready    [2 * busyPorts]uint16 // ring of the ports whose next frame is due
	at, end  uint
	woke     bool
	closed   bool
	warmed   bool
	answered int64  // since it was warm
	dst      uint32 // of the last SYN
}

func (d *busyDevice) Divide(n int) ([]tun.Part, error) {
	var all []tun.Part
	for i := range n {
		p := &busyPart{busyDevice: d, dst: uint32(i) << 20}
		p.more.L = &p.mu
		d.parts = append(d.parts, p)
		all = append(all, p)
	}
	for i := range busyPorts { // as the kernel's hash: not the port's own part
		p := d.parts[i%n]
		p.ready[p.end] = uint16(firstPort + i)
		p.end++
	}
	d.warm.Add(n)
	d.over.Add(n)
	return all, nil
}

func (d *busyDevice) Name() string                                { return "busy0" }
func (d *busyDevice) MTU() int                                    { return 1500 }
func (d *busyDevice) Offload() tun.Offload                        { return tun.VnetHdr | tun.TSO | tun.USO }
func (d *busyDevice) Read(*tun.Header, []byte, bool) (int, error) { return 0, os.ErrClosed }
func (d *busyDevice) Write(*tun.Header, [][]byte) error           { return os.ErrClosed }

func (d *busyDevice) Close() error {
	d.once.Do(func() {
		for _, p := range d.parts {
			p.mu.Lock()
			p.closed = true
			p.mu.Unlock()
			p.more.Signal()
		}
	})
	return nil
}

func (p *busyPart) Wake() {
	p.mu.Lock()
	p.woke = true
	p.mu.Unlock()
	p.more.Signal()
}

func (p *busyPart) Read(h *tun.Header, b []byte, wait bool) (int, error) {
	p.mu.Lock()
	if !p.warmed && p.answered >= busyWarm*busyPorts/int64(len(p.parts)) {
		p.warmed, p.answered = true, 0
		p.mu.Unlock()
		p.warm.Done()
		<-p.begin
		p.mu.Lock()
	}
	for !p.closed && (p.at == p.end || p.done()) {
		if !wait || p.woke {
			p.woke = false
			p.mu.Unlock()
			return 0, tun.ErrAgain
		}
		p.more.Wait()
	}
	if p.closed {
		p.mu.Unlock()
		return 0, os.ErrClosed
	}
	port := p.ready[p.at%uint(len(p.ready))]
	p.at++
	p.mu.Unlock()
	*h = tun.Header{Flags: tun.DataValid}
	return p.put(b, port), nil
}

// done reports whether the part has had its share of the answers.
func (p *busyPart) done() bool { return p.warmed && p.answered >= p.share() }

func (p *busyPart) share() int64 { return p.total/int64(len(p.parts)) + 1 }

// Write takes the answer to a port, which has the next frame come by this part.
func (p *busyPart) Write(_ *tun.Header, parts [][]byte) error {
	port := binary.BigEndian.Uint16(parts[0][22:])
	p.mu.Lock()
	p.ready[p.end%uint(len(p.ready))] = port
	p.end++
	p.answered++
	over := p.warmed && p.answered == p.share()
	p.mu.Unlock()
	p.more.Signal()
	if over {
		p.over.Done()
	}
	return nil
}

// put makes the next frame of a port.
func (p *busyPart) put(b []byte, port uint16) int {
	src, dst := netip.AddrFrom4([4]byte{10, 0, 0, 1}).As4(), [4]byte{203, 0, 113, 1}
	n, proto := 20+8+20, byte(17)
	if p.syn {
		p.dst++
		n, proto, dst = 40, 6, [4]byte{10, 64 | byte(p.dst>>16), byte(p.dst >> 8), byte(p.dst)}
	}
	f := b[:n]
	clear(f)
	f[0], f[8], f[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(f[2:], uint16(n))
	copy(f[12:], src[:])
	copy(f[16:], dst[:])
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(f[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(f[10:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(f[20:], port)
	binary.BigEndian.PutUint16(f[22:], 80)
	if p.syn {
		binary.BigEndian.PutUint32(f[24:], p.dst)
		f[32], f[33] = 5<<4, 2
	} else {
		binary.BigEndian.PutUint16(f[24:], uint16(n-20))
	}
	return n
}
