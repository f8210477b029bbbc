package tun

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun/netns"
)

var (
	app4 = netip.MustParseAddr("10.99.0.1")
	app6 = netip.MustParseAddr("fd00:99::1")
	far4 = netip.MustParseAddr("203.0.113.7")
	far6 = netip.MustParseAddr("2001:db8::7")
)

// kernelTUN is a Device of the kernel in the test's namespace, with addresses and default routes.
func kernelTUN(t testing.TB, vnet bool, m Mode) Device {
	t.Helper()
	return openKernelTUN(t, vnet, Queues, Options{MTU: 1500, Offload: m})
}

func openKernelTUN(t testing.TB, vnet bool, n int, o Options) Device {
	t.Helper()
	if noNamespace != "" {
		t.Skip(noNamespace)
	}
	queues, name, err := netns.OpenTUN(netns.TUNOptions{Name: "vst%d", VnetHdr: vnet, Queues: n, MTU: 1500})
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	if _, err := netns.Configure(name, 0, []netip.Prefix{netip.PrefixFrom(app4, 32), netip.PrefixFrom(app6, 128)},
		true); err != nil {
		netns.CloseTUN(queues)
		t.Fatal(err)
	}
	d, err := FromFiles(queues, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if d.Name() != name || d.MTU() != o.MTU {
		t.Errorf("name %q, MTU %d; want %q, %d", d.Name(), d.MTU(), name, o.MTU)
	}
	return d
}

// readPacket returns the next packet that want takes.
func readPacket(t testing.TB, d Device, want func(packet) bool) (Header, packet, int) {
	t.Helper()
	b := make([]byte, MaxFrame)
	var h Header
	var p packet
	var n int
	testkit.Eventually(t, "the packet", func() bool {
		for range 1000 {
			var err error
			h = Header{}
			if n, err = d.Read(&h, b, false); err == ErrAgain {
				return false
			} else if err != nil {
				t.Fatal(err)
			}
			if got, ok := parse(b[:n]); ok && want(got) {
				p = got
				return true
			}
		}
		return false
	})
	p.payload = bytes.Clone(p.payload)
	return h, p, n
}

var devices = []struct {
	name string
	vnet bool
	n    int // queues
	mode Mode
	want Offload
}{
	{"plain", false, Queues, OffloadFull, 0},
	{"plain, one queue", false, 1, OffloadFull, 0},
	{"off", true, Queues, OffloadOff, VnetHdr},
	{"nouso", true, Queues, OffloadNoUSO, VnetHdr | TSO},
	{"full", true, Queues, OffloadFull, VnetHdr | TSO | USO},
	{"one queue", true, 1, OffloadFull, VnetHdr | TSO | USO},
}

// eachDevice runs f on all kinds of device.
func eachDevice(t *testing.T, f func(t *testing.T, d Device)) {
	for _, c := range devices {
		t.Run(c.name, func(t *testing.T) {
			d := openKernelTUN(t, c.vnet, c.n, Options{MTU: 1500, Offload: c.mode})
			if got := d.Offload(); got != c.want {
				if got|USO == c.want {
					t.Skip("the kernel has no USO (Linux 6.2)")
				}
				t.Fatalf("offload %03b, want %03b", got, c.want)
			}
			f(t, d)
		})
	}
}

func TestUDPBothWays(t *testing.T) {
	eachDevice(t, func(t *testing.T, d Device) {
		for _, far := range []netip.Addr{far4, far6} {
			dst := netip.AddrPortFrom(far, 6881)
			c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(dst))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for _, size := range []int{0, 1, 1000, 1472 - 20} {
				msg := bytes.Repeat([]byte{byte(size), 7}, size/2+1)[:size]
				if _, err := c.Write(msg); err != nil {
					t.Fatal(err)
				}
				h, p, _ := readPacket(t, d, func(p packet) bool { return p.proto == protoUDP && p.dst == dst })
				if !bytes.Equal(p.payload, msg) {
					t.Fatalf("payload of %d bytes, want %d", len(p.payload), size)
				}
				if d.Offload()&TSO == 0 && h != (Header{}) {
					t.Errorf("header %+v without offload", h)
				}
				frame, _, _ := packet{src: dst, dst: p.src, proto: protoUDP, payload: msg}.marshal(false)
				// In parts, empty ones too: the frame is what they give together.
				if err := d.Write(&Header{}, [][]byte{frame[:3], nil, frame[3:21], frame[21:]}); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 2000)
				c.SetReadDeadline(time.Now().Add(testkit.Patience))
				if n, err := c.Read(got); err != nil || !bytes.Equal(got[:n], msg) {
					t.Fatalf("the app got %d bytes, %v", n, err)
				}
			}
		}
	})
}

// TestSuperFrames proves what the offloads are for: runs of datagrams that the app sends with UDP_SEGMENT, or that are
// written to it, cross as one frame where USO is on, and as single packets where it is off.
func TestUDPSuperFrames(t *testing.T) {
	eachDevice(t, func(t *testing.T, d Device) {
		const segs, size = 10, 1200
		payload := bytes.Repeat([]byte("0123456789ab"), segs*size/12)
		for _, far := range []netip.Addr{far4, far6} {
			dst := netip.AddrPortFrom(far, 443)
			c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(dst))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := setUDPSegment(c, size); err != nil {
				t.Skip("the kernel has no UDP_SEGMENT:", err)
			}
			if _, err := c.Write(payload); err != nil {
				t.Fatal(err)
			}
			h, p, _ := readPacket(t, d, func(p packet) bool { return p.dst == dst })
			if d.Offload()&USO != 0 {
				if h.GSOType != GSOUDPL4 || h.GSOSize != size || len(p.payload) != segs*size {
					t.Errorf("header %+v and %d bytes, want one super-frame", h, len(p.payload))
				}
			} else if h.GSOType != GSONone || len(p.payload) != size {
				t.Errorf("header %+v and %d bytes, want a datagram", h, len(p.payload))
			}
			if d.Offload()&USO == 0 {
				continue
			}
			frame, l3, l4 := packet{src: dst, dst: p.src, proto: protoUDP, payload: payload[:len(payload)-1]}.marshal(true)
			out := Header{
				Flags:      NeedsCsum,
				GSOType:    GSOUDPL4,
				HdrLen:     uint16(l3 + l4),
				GSOSize:    size,
				CsumStart:  uint16(l3),
				CsumOffset: 6,
			}
			if err := d.Write(&out, [][]byte{frame}); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, MaxFrame)
			c.SetReadDeadline(time.Now().Add(testkit.Patience))
			for i := range segs {
				n, err := c.Read(got)
				if err != nil {
					t.Fatalf("datagram %d: %v", i, err)
				}
				want := size
				if i == segs-1 {
					want--
				}
				if n != want {
					t.Errorf("datagram %d has %d bytes, want %d", i, n, want)
				}
			}
		}
	})
}

// TestTCPSuperSegments lets a real TCP sender talk to a peer made by hand.
func TestTCPSuperSegments(t *testing.T) {
	eachDevice(t, func(t *testing.T, d Device) {
		for _, far := range []netip.Addr{far4, far6} {
			p := openHandPeer(t, d, netip.AddrPortFrom(far, 80))
			defer p.conn.Close()
			end := p.writtenAtOnce(t, d)
			n := p.readAtOnce(t, d, end)
			rst, _, _ := packet{
				src:   p.here,
				dst:   p.app,
				proto: protoTCP,
				seq:   1001 + uint32(n),
				flags: flagRST,
			}.marshal(
				false,
			)
			d.Write(&Header{}, [][]byte{rst})
		}
	})
}

// handPeer is the far end of a connection of the kernel's, made by hand.
type handPeer struct {
	here, app netip.AddrPort
	conn      net.Conn // the app's
}

// openHandPeer has the app connect, and answers its SYN.
func openHandPeer(t *testing.T, d Device, dst netip.AddrPort) handPeer {
	t.Helper()
	conn := make(chan net.Conn, 1)
	go func() {
		c, err := net.DialTimeout("tcp", dst.String(), 3*testkit.Patience)
		if err != nil {
			t.Error(err)
		}
		conn <- c
	}()
	_, syn, _ := readPacket(t, d, func(p packet) bool { return p.dst == dst && p.flags == flagSYN })
	peer := packet{
		src:   dst,
		dst:   syn.src,
		proto: protoTCP,
		seq:   1000,
		ack:   syn.seq + 1,
		flags: flagSYN | flagACK,
		mss:   1400,
	}
	frame, _, _ := peer.marshal(false)
	if err := d.Write(&Header{}, [][]byte{frame}); err != nil {
		t.Fatal(err)
	}
	c := <-conn
	if c == nil {
		t.FailNow()
	}
	return handPeer{dst, syn.src, c}
}

// writtenAtOnce has the app write, wants a super-segment where the device takes it, and returns what acknowledges that.
func (p handPeer) writtenAtOnce(t *testing.T, d Device) (end uint32) {
	t.Helper()
	if _, err := p.conn.Write(make([]byte, 12000)); err != nil {
		t.Fatal(err)
	}
	h, seg, n := readPacket(t, d, func(q packet) bool { return q.dst == p.here && len(q.payload) > 0 })
	tso := d.Offload()&TSO != 0
	if tso && (n <= 1500 || h.GSOSize == 0 || h.Flags&NeedsCsum == 0) {
		t.Errorf("frame of %d bytes with %+v, want a super-segment", n, h)
	}
	if !tso && (n > 1500 || h.GSOType != GSONone) {
		t.Errorf("frame of %d bytes with %+v, want a segment", n, h)
	}
	return seg.seq + uint32(len(seg.payload))
}

// readAtOnce sends the app 40 segments in one frame, or one where the device takes no more, and returns how many bytes.
func (p handPeer) readAtOnce(t *testing.T, d Device, ack uint32) int {
	t.Helper()
	payload := bytes.Repeat([]byte("abcdefgh"), 7000)
	tso := d.Offload()&TSO != 0
	if !tso {
		payload = payload[:1400]
	}
	frame, l3, l4 := packet{
		src:     p.here,
		dst:     p.app,
		proto:   protoTCP,
		seq:     1001,
		ack:     ack,
		flags:   flagACK | flagPSH,
		payload: payload,
	}.marshal(tso)
	var out Header
	if tso {
		out = Header{
			Flags:      NeedsCsum,
			GSOType:    GSOTCPv4,
			HdrLen:     uint16(l3 + l4),
			GSOSize:    1400,
			CsumStart:  uint16(l3),
			CsumOffset: 16,
		}
		if p.here.Addr().Is6() {
			out.GSOType = GSOTCPv6
		}
	}
	if err := d.Write(&out, [][]byte{frame[:l3+l4], frame[l3+l4:]}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(payload))
	p.conn.SetReadDeadline(time.Now().Add(testkit.Patience))
	for n := 0; n < len(got); {
		k, err := p.conn.Read(got[n:])
		if err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		n += k
	}
	if !bytes.Equal(got, payload) {
		t.Error("the app got other bytes")
	}
	return len(payload)
}

func TestWriteErrors(t *testing.T) {
	good, l3, l4 := packet{
		src:     netip.AddrPortFrom(far4, 1),
		dst:     netip.AddrPortFrom(app4, 2),
		proto:   protoUDP,
		payload: make([]byte, 100),
	}.marshal(
		true,
	)
	eachDevice(t, func(t *testing.T, d Device) {
		vnet := d.Offload()&VnetHdr != 0
		for _, c := range []struct {
			name  string
			h     *Header
			parts [][]byte
			want  error
			vnet  bool // only where there is a header
		}{
			{"nil header", nil, [][]byte{good}, nil, false},
			{"no parts", &Header{}, nil, ErrBadFrame, false},
			{"empty", &Header{}, [][]byte{nil, {}}, ErrBadFrame, false},
			{"version 5", &Header{}, [][]byte{{0x55, 0, 0, 0}}, ErrBadFrame, false},
			{"too long", &Header{}, [][]byte{good, make([]byte, MaxFrame)}, ErrTooLong, false},
			{"the longest", &Header{}, [][]byte{good, make([]byte, MaxFrame-len(good))}, nil, false},
			{"too many parts", &Header{}, bytes.SplitAfter(bytes.Repeat([]byte{0x45}, 1100), []byte{0x45}), ErrTooLong, false},
			{"checksum outside", &Header{Flags: NeedsCsum, CsumStart: 60000, CsumOffset: 6}, [][]byte{good}, ErrBadFrame, true},
			{"no size", &Header{Flags: NeedsCsum, GSOType: GSOUDPL4, HdrLen: uint16(l3 + l4), CsumStart: uint16(l3),
				CsumOffset: 6}, [][]byte{good}, ErrBadFrame, true},
			{"unknown type", &Header{Flags: NeedsCsum, GSOType: 77, GSOSize: 10, HdrLen: uint16(l3 + l4), CsumStart: uint16(l3),
				CsumOffset: 6}, [][]byte{good}, ErrBadFrame, true},
		} {
			if c.vnet && !vnet {
				c.want = ErrBadFrame // needs what this device has not
			}
			if err := d.Write(c.h, c.parts); !errors.Is(err, c.want) {
				t.Errorf("%s: %v, want %v", c.name, err, c.want)
			}
		}
	})
}

func TestReadTooLong(t *testing.T) {
	eachDevice(t, func(t *testing.T, d Device) {
		c, err := net.Dial("udp", netip.AddrPortFrom(far4, 9).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for _, size := range []int{1000, 72, 73} { // 100, 101 bytes with headers
			if _, err := c.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			n, err := d.Read(&Header{}, b, true)
			for b[0]>>4 == 6 { // what the kernel says of itself
				n, err = d.Read(&Header{}, b, true)
			}
			if size == 72 && (n != 100 || err != nil) || size != 72 && err != ErrTooLong {
				t.Errorf("%d bytes of payload in a buffer of 100: %d, %v", size, n, err)
			}
		}
	})
}

func TestCloseWakesRead(t *testing.T) {
	eachDevice(t, func(t *testing.T, d Device) {
		got := make(chan error)
		go func() {
			for {
				if _, err := d.Read(&Header{}, make([]byte, MaxFrame), true); err != nil {
					got <- err
					return
				}
			}
		}()
		testkit.Settle(20*time.Millisecond, "Read waits")
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		select {
		case err := <-got:
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("Read: %v", err)
			}
		case <-time.After(testkit.Patience):
			t.Fatal("Read still waits")
		}
		if err := d.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		if _, err := d.Read(&Header{}, make([]byte, 100), false); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Read: %v", err)
		}
		if err := d.Write(&Header{}, [][]byte{{0x45}}); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Write: %v", err)
		}
	})
}

func TestInterfaceGone(t *testing.T) { eachDevice(t, interfaceGone) }

func interfaceGone(t *testing.T, d Device) {
	if out, err := exec.Command("ip", "link", "set", d.Name(), "down").CombinedOutput(); err != nil {
		t.Skipf("no ip command: %v %s", err, out)
	}
	frame, _, _ := packet{src: netip.AddrPortFrom(far4, 1), dst: netip.AddrPortFrom(app4, 2), proto: protoUDP}.marshal(false)
	if err := d.Write(&Header{}, [][]byte{frame}); err != ErrAgain {
		t.Errorf("Write while it is down: %v", err)
	}
	got := make(chan error)
	go func() {
		for {
			if _, err := d.Read(&Header{}, make([]byte, MaxFrame), true); err != nil {
				got <- err
				return
			}
		}
	}()
	testkit.Settle(20*time.Millisecond, "Read waits")
	if out, err := exec.Command("ip", "link", "del", d.Name()).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	select {
	case err := <-got:
		if errors.Is(err, os.ErrClosed) {
			t.Error("a deleted interface reads as closed by us")
		}
		t.Log(err)
	case <-time.After(testkit.Patience):
		t.Fatal("Read still waits")
	}
	if err := d.Write(&Header{}, [][]byte{frame}); err == nil || err == ErrAgain {
		t.Errorf("Write: %v", err)
	}
}

func TestConcurrentWritersAndClose(t *testing.T) {
	fds := testkit.CountFiles(t)
	d := kernelTUN(t, true, OffloadFull)
	frame, _, _ := packet{
		src:     netip.AddrPortFrom(far4, 1),
		dst:     netip.AddrPortFrom(app4, 2),
		proto:   protoUDP,
		payload: make([]byte, 500),
	}.marshal(
		false,
	)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				err := d.Write(&Header{Flags: DataValid}, [][]byte{frame[:20], frame[20:]})
				if errors.Is(err, os.ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	testkit.Settle(50*time.Millisecond, "all eight write")
	d.Close()
	wg.Wait()
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}

func TestFromFilesRefuses(t *testing.T) {
	fds := testkit.CountFiles(t)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := FromFiles([]*os.File{null}, Options{}); err == nil {
		t.Error("/dev/null is taken for a TUN")
	}
	if node, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err == nil {
		if _, err := FromFiles([]*os.File{node}, Options{}); err == nil {
			t.Error("a TUN without an interface is taken")
		}
	}
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before: FromFiles owns what it refuses", n, fds)
	}
}

func TestWriteAllocatesNothing(t *testing.T) {
	d := kernelTUN(t, true, OffloadFull)
	frame, _, _ := packet{
		src:     netip.AddrPortFrom(far4, 1),
		dst:     netip.AddrPortFrom(app4, 2),
		proto:   protoUDP,
		payload: make([]byte, 500),
	}.marshal(
		false,
	)
	parts := [][]byte{frame[:28], frame[28:]}
	b := make([]byte, MaxFrame)
	h := new(Header)
	if n := testing.AllocsPerRun(200, func() {
		*h = Header{Flags: DataValid}
		if err := d.Write(h, parts); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Read(h, b, false); err != nil && err != ErrAgain {
			t.Fatal(err)
		}
	}); n >= 1 && !raceEnabled { // the race detector empties pools at random
		t.Errorf("%v allocations for a frame", n)
	}
}

func TestMode(t *testing.T) {
	for _, m := range []Mode{OffloadFull, OffloadNoUSO, OffloadOff} {
		if got, err := ParseMode(m.String()); got != m || err != nil {
			t.Errorf("ParseMode(%q) = %v, %v", m.String(), got, err)
		}
	}
	if _, err := ParseMode("half"); err == nil {
		t.Error("half is taken")
	}
	if s := fmt.Sprint(Mode(9)); s != "mode(9)" {
		t.Error(s)
	}
}
