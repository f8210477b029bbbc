package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/stacktest"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// udpHandler hands each burst to a function, on the frame reader.
type udpHandler struct {
	f func(w flow.PacketWriter, ps []flow.Packet)

	mu   sync.Mutex
	w    flow.PacketWriter
	gone []netip.AddrPort // app and remote of each HandleUnreachable
}

func (h *udpHandler) HandleStream(_ int, r flow.StreamRequest) { r.Reject(flow.RefuseReset) }

func (h *udpHandler) HandlePackets(_ int, ps []flow.Packet) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.f(h.w, ps)
}

func (h *udpHandler) HandleUnreachable(_ int, app, remote netip.AddrPort) {
	h.mu.Lock()
	h.gone = append(h.gone, app, remote)
	h.mu.Unlock()
}

// echoUDP writes each datagram back from where it went to.
func echoUDP(w flow.PacketWriter, ps []flow.Packet) {
	out := make([]flow.Packet, len(ps))
	for i, p := range ps {
		out[i] = flow.Packet{Src: p.Dst, Dst: p.Src, Payload: p.Payload}
	}
	_, _ = w.WritePackets(out)
}

// udpPair is an app with its stack, and a whole Stack of ours whose handler is f.
func udpPair(t *testing.T, off tun.Offload, f func(flow.PacketWriter, []flow.Packet)) (*stacktest.App, *Stack, *udpHandler) {
	t.Helper()
	testkit.CheckLeaks(t)
	here, there := tuntest.Pipe(1500, off)
	h := &udpHandler{f: f}
	s, err := New(Config{Device: here, Handler: h})
	if err != nil {
		t.Fatal(err)
	}
	h.w = s.PacketWriter(0)
	app, err := stacktest.New(there, app4.Addr(), app6.Addr())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := app.Close(); err != nil {
			t.Error(err)
		}
	})
	return app, s, h
}

// receive reads one datagram and compares it.
func receive(t *testing.T, c *stacktest.PacketConn, from netip.AddrPort, want []byte) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(testkit.Patience))
	b := make([]byte, 1<<16)
	n, src, err := c.ReadFromAddrPort(b)
	if err != nil {
		t.Fatalf("want %d bytes: %v", len(want), err)
	}
	if src != from || !bytes.Equal(b[:n], want) {
		t.Fatalf("%d bytes from %v, want %d from %v", n, src, len(want), from)
	}
}

// silent checks that nothing comes.
func silent(t *testing.T, c *stacktest.PacketConn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, src, err := c.ReadFromAddrPort(make([]byte, 1<<16)); err == nil {
		t.Fatalf("%d bytes from %v", n, src)
	}
}

var udpOffloads = []tun.Offload{0, tun.VnetHdr, tun.VnetHdr | tun.TSO | tun.USO}

// The way through the whole stack: what fits one frame by the fast path, the rest in fragments. Datagrams whose last
// fragment has 1 or 2 bytes (1473, 1474, 2953) are lost in gVisor's own link endpoint.
func TestUDPEcho(t *testing.T) {
	for _, off := range udpOffloads {
		for _, to := range []netip.AddrPort{far4, far6} {
			t.Run(fmt.Sprintf("%d/%v", off, to.Addr()), func(t *testing.T) {
				app, s, _ := udpPair(t, off, echoUDP)
				c, err := app.ListenUDP(netip.AddrPort{})
				if to == far4 {
					c.Close()
					c, err = app.ListenUDP(app4)
				}
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				sizes := []int{0, 1, 500, 1452, 1453, 1454, 1472, 1473, 1474, 2953, 9000, 65485, 65507}
				for _, n := range sizes {
					if _, err := c.WriteToAddrPort(fill(n), to); err != nil {
						t.Fatalf("%d: %v", n, err)
					}
					receive(t, c, to, fill(n))
				}
				// The counters are behind the frame.
				testkit.Eventually(t, "the counters", func() bool {
					st := s.Stats().UDP
					return st.In == uint64(len(sizes)) && st.Out == st.In && st.InReassembled >= 5
				})
			})
		}
	}
}

func TestUDPSuperFrames(t *testing.T) {
	for _, from := range []netip.AddrPort{app4, app6} {
		app, s, _ := udpPair(t, tun.VnetHdr|tun.TSO|tun.USO, echoUDP)
		to := far4
		if from == app6 {
			to = far6
		}
		c, err := app.ListenUDP(from)
		if err != nil {
			t.Fatal(err)
		}
		super := app.Capture(func(f stacktest.Frame) bool { return f.Header.GSOType == tun.GSOUDPL4 })
		d := stacktest.Datagram{Src: from, Dst: to, Payload: fill(10*1200 + 77)}
		if err := app.Inject(d.SuperFrame(1200)); err != nil {
			t.Fatal(err)
		}
		for rest := d.Payload; len(rest) > 0; rest = rest[min(1200, len(rest)):] {
			receive(t, c, to, rest[:min(1200, len(rest))])
		}
		testkit.Eventually(t, "the counters", func() bool {
			st := s.Stats().UDP
			return st.In == 11 && st.InSuper == 1 && st.Out == 11 && st.OutSuper == 1
		})
		if n := len(super.Frames()); n != 1 {
			t.Errorf("%d super-frames", n)
		}
		c.Close()
	}
}

// A datagram from an endpoint that the app never wrote to comes from its true source.
func TestUDPStranger(t *testing.T) {
	stranger := addr("198.51.100.99:1")
	app, _, _ := udpPair(t, 0, func(w flow.PacketWriter, ps []flow.Packet) {
		_, _ = w.WritePackets([]flow.Packet{{Src: stranger, Dst: ps[0].Src, Payload: []byte("hello")}})
	})
	c, err := app.ListenUDP(app4)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.WriteToAddrPort([]byte("x"), far4)
	receive(t, c, stranger, []byte("hello"))
}

// frags is a datagram in fragments. The order in which they come must not matter.
func frags(from, to netip.AddrPort, n int, id uint32) []stacktest.Frame {
	return stacktest.Datagram{Src: from, Dst: to, Payload: fill(n)}.Frame().Fragments(1500, id)
}

func inject(t *testing.T, app *stacktest.App, fs ...stacktest.Frame) {
	t.Helper()
	for _, f := range fs {
		var err error
		if !testkit.Until(testkit.Patience, func() bool { err = app.Inject(f); return !errors.Is(err, tun.ErrAgain) }) ||
			err != nil {
			t.Fatal(err)
		}
	}
}

func TestUDPFragments(t *testing.T) {
	for _, from := range []netip.AddrPort{app4, app6} {
		to, most := far4, 65507
		if from == app6 {
			to, most = far6, 65527
		}
		t.Run(to.Addr().String(), func(t *testing.T) {
			x := fragmentTest{from: from, to: to, most: most}
			x.app, x.s, x.h = udpPair(t, 0, nil)
			c, err := x.app.ListenUDP(from)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			x.c = c
			x.orders(t)
			x.interleaved(t)
			x.overlapping(t)
			x.wrongChecksum(t)
			x.impossible(t)
			x.flood(t)
			testkit.Eventually(t, "the counters, which are behind the frame", func() bool {
				return x.s.Stats().UDP.InReassembled >= 15
			})
			if got := x.s.Stats().UDP; got.DroppedMalformed != 0 || got.InReassembled != 15 {
				t.Errorf("%+v", got)
			}
		})
	}
}

// fragmentTest is an app that sends fragments from one endpoint to another, which echoes what it gets.
type fragmentTest struct {
	app      *stacktest.App
	s        *Stack
	h        *udpHandler
	c        *stacktest.PacketConn
	from, to netip.AddrPort
	most     int // bytes of a datagram
}

func (x *fragmentTest) frags(n int, id uint32) []stacktest.Frame { return frags(x.from, x.to, n, id) }

func (x *fragmentTest) orders(t *testing.T) {
	var heads [][]byte
	x.h.f = func(w flow.PacketWriter, ps []flow.Packet) {
		heads = append(heads, bytes.Clone(ps[0].Head))
		echoUDP(w, ps)
	}
	id := uint32(0)
	for _, n := range []int{1473, 1474, 2953, x.most} {
		for _, order := range []string{"in order", "reversed", "twice"} {
			id++
			fs := x.frags(n, id)
			switch order {
			case "reversed":
				slices.Reverse(fs)
			case "twice":
				fs = slices.Insert(fs, 1, fs[0])
			}
			inject(t, x.app, fs...)
			receive(t, x.c, x.to, fill(n))
		}
	}
	for _, head := range heads {
		out, ok := appendUnreachable(nil, head, flow.RefusePort)
		if !ok {
			t.Fatalf("Head can't be quoted: %x", head)
		}
		checkICMP(t, out, x.to.Addr(), x.from.Addr())
	}
}

// interleaved sends two streams of fragments at a time.
func (x *fragmentTest) interleaved(t *testing.T) {
	a, b := x.frags(5000, 101), x.frags(5001, 102)
	for i := range a {
		inject(t, x.app, a[i], b[i])
	}
	receive(t, x.c, x.to, fill(5000))
	receive(t, x.c, x.to, fill(5001))
}

// overlapping: nothing of it may be handed on (RFC 8200 4.5, and Linux over IPv4 too).
func (x *fragmentTest) overlapping(t *testing.T) {
	a := x.frags(4000, 103)
	over := x.frags(4000, 103)[1]
	if x.from == app4 {
		binary.BigEndian.PutUint16(over.Data[6:], binary.BigEndian.Uint16(over.Data[6:])-1)
		sum4(over.Data)
	} else {
		binary.BigEndian.PutUint16(over.Data[42:], binary.BigEndian.Uint16(over.Data[42:])-8)
	}
	inject(t, x.app, a[0], over, a[1])
	silent(t, x.c)
	// gVisor forgot the first attempt, so that the last fragment alone waits.
	inject(t, x.app, a[2])
	silent(t, x.c)
}

// wrongChecksum is only seen when the datagram is whole.
func (x *fragmentTest) wrongChecksum(t *testing.T) {
	a := x.frags(4000, 104)
	a[2].Data[len(a[2].Data)-1] ^= 1
	inject(t, x.app, a...)
	silent(t, x.c)
	testkit.Eventually(t, "the wrong checksum to be counted", func() bool { return x.s.Stats().UDP.DroppedChecksum == 1 })
}

// impossible sends what is beyond 64 KiB when put together, and a fragment of no length, without a first one.
func (x *fragmentTest) impossible(t *testing.T) {
	last := x.frags(x.most, 105)
	end := last[len(last)-1]
	if x.from == app4 {
		binary.BigEndian.PutUint16(end.Data[6:], 0x1fff)
		sum4(end.Data)
	} else {
		binary.BigEndian.PutUint16(end.Data[42:], 0xfff8)
	}
	inject(t, x.app, last[0], end)
	empty := x.frags(3000, 106)[1]
	if x.from == app4 {
		empty.Data = empty.Data[:20]
		binary.BigEndian.PutUint16(empty.Data[2:], 20)
		sum4(empty.Data)
	} else {
		empty.Data = empty.Data[:48]
		binary.BigEndian.PutUint16(empty.Data[4:], 8)
	}
	inject(t, x.app, empty)
	silent(t, x.c)
}

// flood sends first fragments: what gVisor holds of them is bounded, and the next whole datagram gets through.
func (x *fragmentTest) flood(t *testing.T) {
	for i := range 6000 {
		inject(t, x.app, x.frags(1600, uint32(1000+i))[0])
	}
	inject(t, x.app, x.frags(3000, 107)...)
	receive(t, x.c, x.to, fill(3000))
}

// Fragments to where nothing is relayed are no way around the rule.
func TestUDPFragmentsDropped(t *testing.T) {
	app, s, _ := udpPair(t, 0, func(_ flow.PacketWriter, ps []flow.Packet) { t.Errorf("handed on: %v", ps[0].Dst) })
	var id uint32
	for _, to := range []string{"239.192.152.143:6771", "[ff15::efc0:988f]:6771", "255.255.255.255:67", "127.0.0.1:53",
		"[::1]:53"} {
		from := app4
		if addr(to).Addr().Is6() {
			from = app6
		}
		id++
		inject(t, app, frags(from, addr(to), 3000, id)...)
	}
	// Something that is answered, behind all of them.
	if _, err := app.DialTCP(context.Background(), far4); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal(err)
	}
	if st := s.Stats().UDP; st.In != 0 {
		t.Errorf("%+v", st)
	}
}

// The refusal of a datagram reaches the program as an errno, also when it came in fragments.
func TestUDPRefused(t *testing.T) {
	for _, n := range []int{10, 5000} {
		for _, c := range []struct{ from, to netip.AddrPort }{{app4, far4}, {app6, far6}} {
			app, s, _ := udpPair(t, 0, func(w flow.PacketWriter, ps []flow.Packet) {
				for _, p := range ps {
					w.Refuse(p, flow.RefusePort)
				}
			})
			conn, err := app.DialUDP(c.from, c.to)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write(fill(n)); err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(testkit.Patience))
			if _, err := conn.Read(make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%d bytes to %v: %v", n, c.to, err)
			}
			testkit.Eventually(t, "the counter", func() bool { return s.Stats().UDP.Refused == 1 })
		}
	}
}

// The app's socket is gone: its kernel says so, and the handler is told.
func TestUDPClosedSocket(t *testing.T) {
	for _, c := range []struct{ from, to netip.AddrPort }{{app4, far4}, {app6, far6}} {
		hold, held := make(chan struct{}), make(chan struct{}, 100)
		app, _, h := udpPair(t, 0, func(w flow.PacketWriter, ps []flow.Packet) {
			held <- struct{}{}
			<-hold
			echoUDP(w, ps)
		})
		release := sync.OnceFunc(func() { close(hold) })
		t.Cleanup(release) // a test that fails must not leave the stack waiting
		conn, err := app.ListenUDP(c.from)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.WriteToAddrPort([]byte("x"), c.to)
		testkit.Eventually(t, "the datagram at the handler", func() bool { return len(held) > 0 })
		conn.Close()
		release()
		testkit.Eventually(t, "the ICMP error", func() bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			return slices.Equal(h.gone, []netip.AddrPort{c.from, c.to})
		})
	}
}
