package tun

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// dialUDP is a connected socket of the app.
func dialUDP(t testing.TB, port uint16) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(far4, port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func spin(d time.Duration) {
	for start := time.Now(); time.Since(start) < d; {
	}
}

// TestFloodLeavesOthers: one socket sends more than is read, and twenty others, which share the queues with it by chance,
// have their answers.
func TestFloodLeavesOthers(t *testing.T) {
	d := kernelTUN(t, true, OffloadNoUSO)
	var wg sync.WaitGroup
	wg.Go(func() { answerPings(t, d) })
	defer wg.Wait()
	defer d.Close()

	const pingers, each = 20, 40
	flooder := dialUDP(t, floodPort)
	var conns []*net.UDPConn
	for range pingers {
		conns = append(conns, dialUDP(t, echoPort))
	}
	for try := 1; ; try++ { // a machine that stalls fills any queue
		var stop atomic.Bool
		var flood, ping sync.WaitGroup
		sent := 0
		flood.Go(func() {
			b := make([]byte, 1200)
			for !stop.Load() {
				flooder.Write(b)
				sent++
			}
		})
		var lost atomic.Int64
		var mu sync.Mutex
		var worst int64
		for _, c := range conns {
			ping.Go(func() {
				mine := lostPings(c, uint64(try)<<32, each)
				lost.Add(mine)
				mu.Lock()
				defer mu.Unlock()
				worst = max(worst, mine)
			})
		}
		ping.Wait()
		stop.Store(true)
		flood.Wait()
		t.Logf("beside %d datagrams %d of %d were lost, %d of one socket", sent, lost.Load(), pingers*each, worst)
		if lost.Load() <= pingers*each/20 && worst <= each/4 {
			return
		}
		if try == 5 {
			t.Fatal("the flood starves others")
		}
	}
}

const floodPort, echoPort = 9, 7

// answerPings does what the stack would, until the device is closed: each datagram of the flood costs it a little, the others
// are sent back.
func answerPings(t *testing.T, d Device) {
	var h Header
	b := make([]byte, MaxFrame)
	for {
		n, err := d.Read(&h, b, true)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			t.Error(err)
			return
		}
		p, ok := parse(b[:n])
		switch {
		case !ok || p.proto != protoUDP:
		case p.dst.Port() == floodPort:
			spin(4 * time.Microsecond)
		case p.dst.Port() == echoPort:
			frame, _, _ := packet{src: p.dst, dst: p.src, proto: protoUDP, payload: p.payload}.marshal(false)
			if err := d.Write(&Header{}, [][]byte{frame}); err != nil && err != ErrAgain {
				t.Error(err)
			}
		}
	}
}

// lostPings sends datagrams that are numbered from first on, and counts those without an answer.
func lostPings(c net.Conn, first uint64, each int) (lost int64) {
	out, in := make([]byte, 100), make([]byte, 100)
	for i := range uint64(each) {
		binary.BigEndian.PutUint64(out, first|i)
		c.Write(out)
		c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		for {
			if _, err := c.Read(in); err != nil {
				lost++
				break
			}
			if binary.BigEndian.Uint64(in) == first|i {
				break
			}
		}
		testkit.Pace(time.Millisecond)
	}
	return lost
}

// TestBurstsAreNoFlood: bursts that are read to the end, however many, do not make a queue flooded.
func TestBurstsAreNoFlood(t *testing.T) {
	d := kernelTUN(t, true, OffloadNoUSO)
	q := d.(*fileDevice).q
	c := dialUDP(t, 9)
	b, h := make([]byte, MaxFrame), new(Header)
	for i := range 3 * floodTurns {
		n := turn
		if i == 0 {
			n = 2*turn - 1 // 1, 2, 4 … until a turn has 64
		}
		for range n {
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		for {
			_, err := d.Read(h, b, false)
			if err == ErrAgain {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range q.fds {
		if !q.calm(i) {
			t.Errorf("queue %d is taken for flooded", i)
		}
	}
}

// TestReaderStepsBack: with one processor and more frames than can be read, who waits for another descriptor is not kept
// waiting until the runtime's monitor looks, every 10 ms.
func TestReaderStepsBack(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	d := kernelTUN(t, true, OffloadNoUSO)
	var sent int
	for i := range 40 { // in many queues
		c := dialUDP(t, uint16(1000+i))
		for range 100 {
			c.Write([]byte("x"))
			sent++
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var seen atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		r.Read(make([]byte, 1))
		seen.Store(true)
	})
	defer wg.Wait()
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	testkit.Settle(10*time.Millisecond, "the other goroutine waits in its read")
	raw.Control(func(fd uintptr) { unix.Write(int(fd), []byte("x")) })
	b, h := make([]byte, MaxFrame), new(Header)
	frames := 0
	for !seen.Load() && frames < sent-100 {
		if _, err := d.Read(h, b, true); err != nil {
			t.Fatal(err)
		}
		frames++
		spin(20 * time.Microsecond)
	}
	if t.Logf("after %d of %d frames", frames, sent); frames > 3*stepBack { // the monitor would need some 500
		t.Errorf("%d frames were read before the other had its turn", frames)
	}
}

func TestToward(t *testing.T) {
	q := &queues{fds: make([]int, frameQueues), until: make([]atomic.Int64, frameQueues), base: time.Now()}
	frame := func(port uint16) [][]byte {
		b, _, _ := packet{src: netip.AddrPortFrom(far4, 1), dst: netip.AddrPortFrom(app4, port), proto: protoUDP}.marshal(false)
		return [][]byte{b}
	}
	used := map[int]int{}
	for port := uint16(32768); port < 32768+16*frameQueues; port += 2 { // as the kernel chooses them
		i := q.toward(frame(port))
		if i != q.toward(frame(port)) {
			t.Fatal("it is not the same queue each time")
		}
		used[i]++
	}
	for i := range frameQueues {
		if used[i] < 2 || used[i] > 24 {
			t.Errorf("queue %d has %d of %d ports", i, used[i], 8*frameQueues)
		}
	}
	first := q.toward(frame(40000))
	q.flooded(first)
	second := q.toward(frame(40000))
	if second == first {
		t.Error("a flooded queue is chosen")
	}
	q.flooded(second)
	if q.toward(frame(40000)) != first {
		t.Error("with both flooded it is not the first")
	}
	q.base = q.base.Add(-2 * floodTerm)
	if q.toward(frame(40000)) != first {
		t.Error("the queue is calm again and not chosen")
	}
	one := &queues{fds: make([]int, 1)}
	if one.toward(frame(40000)) != 0 {
		t.Error("not the only queue")
	}
}

func TestAppPort(t *testing.T) {
	for _, proto := range []byte{protoTCP, protoUDP} {
		for _, a := range []netip.Addr{app4, app6} {
			far := far4
			if a.Is6() {
				far = far6
			}
			b, l3, l4 := packet{
				src:     netip.AddrPortFrom(far, 7),
				dst:     netip.AddrPortFrom(a, 51413),
				proto:   proto,
				payload: []byte("hello"),
			}.marshal(
				false,
			)
			for name, parts := range map[string][][]byte{"one": {b}, "headers apart": {b[:l3], b[l3 : l3+l4], b[l3+l4:]},
				"payload apart": {b[:l3+l4], b[l3+l4:]}} {
				if got := appPort(parts); got != 51413 {
					t.Errorf("%d %s %s: %d", proto, a, name, got)
				}
			}
			for n := range b[:l3+4] {
				if got := appPort([][]byte{b[:n]}); got != 0 {
					t.Errorf("%d %s cut to %d: %d", proto, a, n, got)
				}
			}
			other := append([]byte{}, b...)
			if a.Is4() {
				other[7] = 1 // a later fragment
				if got := appPort([][]byte{other}); got != 0 {
					t.Errorf("fragment: %d", got)
				}
				other[7], other[9] = 0, 1
			} else {
				other[6] = 58
			}
			if got := appPort([][]byte{other}); got != 0 {
				t.Errorf("ICMP: %d", got)
			}
		}
	}
	if appPort(nil) != 0 || appPort([][]byte{nil, nil}) != 0 {
		t.Error("a port out of nothing")
	}
}

// TestOpenQueuesFails: what cannot be polled is closed, and nothing else stays open.
func TestOpenQueuesFails(t *testing.T) {
	fds := testkit.CountFiles(t)
	plain, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(plain.Fd(), unix.F_DUPFD_CLOEXEC, 3) // epoll refuses a plain file
	if err != nil {
		t.Fatal(err)
	}
	plain.Close()
	if _, err := openQueues([]int{fd}); err == nil {
		t.Error("a plain file can be polled")
	}
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}
