package stacktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

func TestMain(m *testing.M) { testkit.Main(m) }

var (
	app4 = netip.MustParseAddr("10.0.0.2")
	app6 = netip.MustParseAddr("fd00::2")
	far4 = netip.MustParseAddr("203.0.113.7")
	far6 = netip.MustParseAddr("2001:db8::7")
)

const all = tun.VnetHdr | tun.TSO | tun.USO

// pair is two apps that see each other.
func pair(t *testing.T, off tun.Offload) (app, far *App) {
	t.Helper()
	x, y := tuntest.Pipe(1500, off)
	app, err := New(x, app4, app6)
	if err != nil {
		t.Fatal(err)
	}
	if far, err = New(y, far4, far6); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, a := range []*App{app, far, app} {
			if err := a.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return app, far
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// each runs f over both families, with and without offload.
func each(t *testing.T, f func(t *testing.T, off tun.Offload, app, far netip.Addr)) {
	for _, off := range []tun.Offload{0, tun.VnetHdr, all} {
		t.Run(fmt.Sprintf("offload-%d/IPv4", off), func(t *testing.T) { f(t, off, app4, far4) })
		t.Run(fmt.Sprintf("offload-%d/IPv6", off), func(t *testing.T) { f(t, off, app6, far6) })
	}
}

func TestTCP(t *testing.T) {
	each(t, func(t *testing.T, off tun.Offload, _, to netip.Addr) {
		app, far := pair(t, off)
		l, err := far.ListenTCP(netip.AddrPortFrom(to, 80))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() { // an echo that ends when its peer does
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		super := app.Capture(func(f Frame) bool { return f.Header.GSOType != 0 })
		c, err := app.DialTCP(within(t, testkit.Patience), netip.AddrPortFrom(to, 80))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		go func() {
			_, _ = c.Write(want)
			_ = c.CloseWrite()
		}()
		_ = c.SetDeadline(time.Now().Add(3 * testkit.Patience))
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes back: %v", len(got), err)
		}
		if n := len(super.Frames()); (n > 0) != (off&tun.TSO != 0) {
			t.Errorf("%d super-segments", n)
		}
	})
}

func TestTCPRefused(t *testing.T) {
	each(t, func(t *testing.T, off tun.Offload, _, to netip.Addr) {
		app, _ := pair(t, off)
		_, err := app.DialTCP(within(t, testkit.Patience), netip.AddrPortFrom(to, 81))
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
	})
}

func TestTCPReset(t *testing.T) {
	app, far := pair(t, all)
	l, err := far.ListenTCP(netip.AddrPortFrom(far4, 80))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	src := netip.AddrPortFrom(app4, 5555)
	c, err := app.DialTCPFrom(within(t, testkit.Patience), src, netip.AddrPortFrom(far4, 80))
	if err != nil {
		t.Fatal(err)
	}
	if c.LocalAddr().(*net.TCPAddr).AddrPort() != src {
		t.Errorf("from %v", c.LocalAddr())
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cap := far.Capture(func(f Frame) bool { s, ok := f.TCP(); return ok && s.Flags&(RST|FIN) != 0 })
	c.Abort()
	f, err := cap.Next(within(t, testkit.Patience))
	if err != nil {
		t.Fatal(err)
	}
	if seg, _ := f.TCP(); seg.Flags&RST == 0 || seg.Src != src {
		t.Errorf("%v", seg)
	}
	_, err = s.Read(make([]byte, 1))
	if err = translate("read", err); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the other side reads %v", err)
	}
}

func TestTCPUnreachable(t *testing.T) {
	for _, c := range []struct {
		typ4, code4 uint8
		want4       unix.Errno
		typ6, code6 uint8
		want6       unix.Errno
	}{
		{3, 0, unix.ENETUNREACH, 1, 0, unix.ENETUNREACH},
		{3, 1, unix.EHOSTUNREACH, 1, 3, unix.EHOSTUNREACH},
		{3, 13, unix.EHOSTUNREACH, 1, 1, unix.EACCES},
		{3, 3, unix.ECONNREFUSED, 1, 4, unix.ECONNREFUSED},
	} {
		for _, v6 := range []bool{false, true} {
			to, typ, code, want := far4, c.typ4, c.code4, c.want4
			if v6 {
				to, typ, code, want = far6, c.typ6, c.code6, c.want6
			}
			x, y := tuntest.Pipe(1500, all)
			app, err := New(x, app4, app6)
			if err != nil {
				t.Fatal(err)
			}
			go func() { // the far end: one answer
				var h tun.Header
				b := make([]byte, tun.MaxFrame)
				n, err := y.Read(&h, b, true)
				if err != nil {
					return
				}
				s, _ := Frame{h, b[:n]}.TCP()
				f := ICMP{Src: to, Dst: s.Src.Addr(), Type: typ, Code: code, Quote: b[:n]}.Frame()
				_ = y.Write(&f.Header, [][]byte{f.Data})
			}()
			if _, err := app.DialTCP(within(t, testkit.Patience), netip.AddrPortFrom(to, 80)); !errors.Is(err, want) {
				t.Errorf("%d/%d: %v, want %v", typ, code, err, want)
			}
			if err := app.Close(); err != nil {
				t.Error(err)
			}
			y.Close()
		}
	}
}

// A program that gives up in SYN_SENT is silent, as on Linux: what comes after the SYN is nothing.
func TestTCPGiveUp(t *testing.T) {
	x, y := tuntest.Pipe(1500, all)
	app, err := New(x, app4)
	if err != nil {
		t.Fatal(err)
	}
	defer y.Close()
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := app.DialTCP(ctx, netip.AddrPortFrom(far4, 80)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	if err := app.Close(); err != nil {
		t.Fatal(err)
	}
	retransmissions := int(time.Since(began) / time.Second) // of a machine that stalls
	var h tun.Header
	b := make([]byte, tun.MaxFrame)
	var got []string
	for {
		n, err := y.Read(&h, b, false)
		if err != nil {
			break
		}
		s, _ := Frame{h, b[:n]}.TCP()
		got = append(got, s.String())
	}
	if n := len(got); n == 0 || n > 1+retransmissions || strings.Count(strings.Join(got, "\n"), " S ") != n {
		t.Fatalf("%q", got)
	}
}

func TestUDP(t *testing.T) {
	each(t, func(t *testing.T, off tun.Offload, from, to netip.Addr) {
		app, far := pair(t, off)
		a, err := app.ListenUDP(netip.AddrPortFrom(from, 4000))
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		b, err := far.ListenUDP(netip.AddrPortFrom(netip.Addr{}, 53))
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		buf := make([]byte, 1<<16)
		for _, n := range []int{0, 1, 1472, 1473, 1474, 2953, 60000, 65507} {
			if _, err := a.WriteToAddrPort(bytes.Repeat([]byte{byte(n)}, n), netip.AddrPortFrom(to, 53)); err != nil {
				t.Fatalf("%d: %v", n, err)
			}
			_ = b.SetReadDeadline(time.Now().Add(testkit.Patience))
			m, peer, err := b.ReadFromAddrPort(buf)
			if err != nil || m != n || peer != a.LocalAddrPort() {
				t.Fatalf("%d: %d bytes from %v: %v", n, m, peer, err)
			}
		}
		// The answer from an address that was not written to.
		if off&tun.USO != 0 {
			d := Datagram{Src: netip.AddrPortFrom(to, 9), Dst: netip.AddrPortFrom(from, 4000), Payload: make([]byte, 2500)}
			if err := far.Inject(d.SuperFrame(1000)); err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{1000, 1000, 500} {
				_ = a.SetReadDeadline(time.Now().Add(testkit.Patience))
				m, peer, err := a.ReadFromAddrPort(buf)
				if err != nil || m != n || peer != d.Src {
					t.Fatalf("%d bytes from %v: %v", m, peer, err)
				}
			}
		}
		// Nobody listens: the connected socket is told.
		c, err := app.DialUDP(netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, 54))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(testkit.Patience))
		if _, err := c.Read(buf); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
	})
}

func TestFragments(t *testing.T) {
	for _, from := range []netip.Addr{app4, app6} {
		app, far := pair(t, 0)
		to := far4
		if from == app6 {
			to = far6
		}
		b, err := far.ListenUDP(netip.AddrPortFrom(to, 53))
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		for i, n := range []int{1473, 1474, 2953, 65507} {
			d := Datagram{Src: netip.AddrPortFrom(from, 7), Dst: netip.AddrPortFrom(to, 53), Payload: make([]byte, n)}
			for _, f := range d.Frame().Fragments(1500, uint32(i+1)) {
				if len(f.Data) > 1500 {
					t.Fatalf("a fragment of %d bytes", len(f.Data))
				}
				if err := app.Inject(f); err != nil {
					t.Fatal(err)
				}
			}
			_ = b.SetReadDeadline(time.Now().Add(testkit.Patience))
			if m, peer, err := b.ReadFromAddrPort(make([]byte, 1<<16)); m != n || peer != d.Src || err != nil {
				t.Fatalf("%d: %d bytes from %v: %v", n, m, peer, err)
			}
		}
	}
}

// What no kernel would take is told at Close.
func TestFaults(t *testing.T) {
	good := Datagram{Src: netip.AddrPortFrom(far4, 9), Dst: netip.AddrPortFrom(app4, 4000), Payload: make([]byte, 500)}
	change := func(at int, v byte) Frame {
		f := good.Frame()
		f.Data[at] ^= v
		return f
	}
	bad := good.SuperFrame(100)
	bad.Header.HdrLen = 1
	blank := good.SuperFrame(100)
	blank.Data[26]++
	for name, f := range map[string]Frame{
		"wrong checksum, protocol 17": change(40, 1),
		"wrong IPv4 header checksum":  change(10, 1),
		"impossible lengths":          {Data: good.Frame().Data[:100]},
		"UDP length 509":              change(25, 1),
		"offload header":              bad,
		"pseudo-header":               blank,
	} {
		x, y := tuntest.Pipe(1500, all)
		app, err := New(x, app4)
		if err != nil {
			t.Fatal(err)
		}
		c := app.Capture(nil)
		if err := y.Write(&f.Header, [][]byte{f.Data}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Next(within(t, testkit.Patience)); err != nil {
			t.Fatal(err)
		}
		y.Close()
		if err := app.Close(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCloseGivesBack(t *testing.T) {
	testkit.CheckLeaks(t)
	app, far := pair(t, all)
	l, err := far.ListenTCP(netip.AddrPortFrom(far4, 80))
	if err != nil {
		t.Fatal(err)
	}
	for range 10 { // left open by the program
		if _, err := app.DialTCP(within(t, testkit.Patience), netip.AddrPortFrom(far4, 80)); err != nil {
			t.Fatal(err)
		}
		if _, err := app.ListenUDP(netip.AddrPort{}); err != nil {
			t.Fatal(err)
		}
	}
	app.Deaf(true)
	if err := app.Close(); err != nil {
		t.Error(err)
	}
	l.Close()
	if err := far.Close(); err != nil {
		t.Error(err)
	}
	if err := app.Inject(Frame{Data: []byte{0x45}}); err == nil {
		t.Error("written after Close")
	}
}

func FuzzFrame(f *testing.F) {
	f.Add(
		Datagram{Src: netip.AddrPortFrom(far4, 9), Dst: netip.AddrPortFrom(app4, 4), Payload: []byte("x")}.Frame().Data,
		uint8(0),
		uint8(0),
		uint16(0),
		uint16(0),
	)
	f.Add(
		Datagram{
			Src:     netip.AddrPortFrom(far6, 9),
			Dst:     netip.AddrPortFrom(app6, 4),
			Payload: make([]byte, 90),
		}.SuperFrame(
			9,
		).Data,
		uint8(1),
		uint8(5),
		uint16(48),
		uint16(9),
	)
	f.Add(
		Segment{Src: netip.AddrPortFrom(far6, 9), Dst: netip.AddrPortFrom(app6, 4), Flags: SYN}.Frame().Data,
		uint8(0),
		uint8(0),
		uint16(0),
		uint16(0),
	)
	f.Fuzz(func(t *testing.T, b []byte, flags, gso uint8, hdrLen, size uint16) {
		fr := Frame{
			tun.Header{Flags: flags, GSOType: gso, HdrLen: hdrLen, GSOSize: size, CsumStart: hdrLen - 8, CsumOffset: 6},
			b,
		}
		fr.TCP()
		fr.UDP()
		if m, ok := fr.ICMP(); ok {
			m.quoted()
			unreachableErrno(m)
		}
		fs, err := receive(fr)
		if err != nil {
			return
		}
		for _, x := range fs {
			x.Header = tun.Header{}
			if _, err := receive(x); err != nil {
				t.Fatalf("taken, and then not: %v", err)
			}
		}
	})
}
