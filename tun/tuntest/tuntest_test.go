package tuntest

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

const all = tun.VnetHdr | tun.TSO | tun.USO

func TestMain(m *testing.M) { testkit.Main(m) }

func TestPipeBothWays(t *testing.T) {
	a, b := Pipe(1400, all)
	defer a.Close()
	defer b.Close()
	if a.Name() == b.Name() || a.MTU() != 1400 || b.Offload() != all {
		t.Errorf("%s and %s, MTU %d, offload %b", a.Name(), b.Name(), a.MTU(), b.Offload())
	}
	for _, d := range [][2]*Device{{a, b}, {b, a}} {
		want := tun.Header{Flags: tun.NeedsCsum, GSOType: tun.GSOUDPL4, HdrLen: 4, GSOSize: 3, CsumStart: 2, CsumOffset: 1}
		for i := range byte(5) {
			if err := d[0].Write(&want, [][]byte{nil, {0x45, 1}, {2, 3}, {4, i}}); err != nil {
				t.Fatal(err)
			}
		}
		for i := range byte(5) {
			var h tun.Header
			got := make([]byte, 100)
			n, err := d[1].Read(&h, got, i%2 == 0)
			if err != nil || h != want || !bytes.Equal(got[:n], []byte{0x45, 1, 2, 3, 4, i}) {
				t.Errorf("% x with %+v, %v", got[:n], h, err)
			}
		}
		if _, err := d[1].Read(new(tun.Header), nil, false); err != tun.ErrAgain {
			t.Errorf("Read of nothing: %v", err)
		}
	}
}

func TestFullQueueDrops(t *testing.T) {
	a, b := Pipe(1500, 0)
	defer b.Close()
	defer a.Close()
	for range QueueFrames {
		if err := a.Write(nil, [][]byte{{0x45}}); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if err := a.Write(nil, [][]byte{{0x45}}); err != tun.ErrAgain {
			t.Errorf("Write to a full queue: %v", err)
		}
	}
	if a.Dropped() != 3 || b.Dropped() != 0 {
		t.Errorf("dropped %d and %d", a.Dropped(), b.Dropped())
	}
}

func TestTap(t *testing.T) {
	a, b := Pipe(1500, 0)
	defer a.Close()
	defer b.Close()
	a.Tap(func(h tun.Header, frame []byte) bool { return frame[1] != 7 })
	for _, c := range []byte{6, 7, 8} {
		if err := a.Write(nil, [][]byte{{0x60, c}}); err != nil {
			t.Error(err)
		}
	}
	a.Tap(nil)
	a.Write(nil, [][]byte{{0x60, 7}})
	for _, want := range []byte{6, 8, 7} {
		got := make([]byte, 2)
		if _, err := b.Read(new(tun.Header), got, false); err != nil || got[1] != want {
			t.Errorf("read %d, %v; want %d", got[1], err, want)
		}
	}
}

func TestCloseWakesRead(t *testing.T) {
	for _, byPeer := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a, b := Pipe(1500, 0)
			got := make(chan error)
			go func() {
				_, err := a.Read(new(tun.Header), make([]byte, 10), true)
				got <- err
			}()
			testkit.Advance(time.Second)
			if byPeer {
				b.Close()
			} else {
				a.Close()
			}
			if err := <-got; !errors.Is(err, os.ErrClosed) {
				t.Errorf("by the peer %v: %v", byPeer, err)
			}
			if err := a.Write(nil, [][]byte{{0x45}}); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Write, by the peer %v: %v", byPeer, err)
			}
			a.Close()
			b.Close()
			b.Close()
		})
	}
}

func TestRefusals(t *testing.T) {
	gso := tun.Header{Flags: tun.NeedsCsum, GSOType: tun.GSOTCPv4, GSOSize: 1, HdrLen: 2, CsumOffset: 2}
	for _, c := range []struct {
		name string
		off  tun.Offload
		h    tun.Header
		b    []byte
		want error
	}{
		{"empty", all, tun.Header{}, nil, tun.ErrBadFrame},
		{"version", all, tun.Header{}, []byte{0x55}, tun.ErrBadFrame},
		{"long", all, tun.Header{}, make([]byte, tun.MaxFrame+1), tun.ErrTooLong},
		{"gso", all, gso, []byte{0x45, 0, 0, 0}, nil},
		{"gso without TSO", tun.VnetHdr | tun.USO, gso, []byte{0x45, 0, 0, 0}, tun.ErrBadFrame},
		{"gso without headers", 0, gso, []byte{0x45, 0, 0, 0}, tun.ErrBadFrame},
		{"checksum outside", all, gso, []byte{0x45, 0, 0}, tun.ErrBadFrame},
		{"headers outside", all, tun.Header{HdrLen: 2}, []byte{0x45}, tun.ErrBadFrame},
		{"unknown type", all, tun.Header{GSOType: 9, Flags: tun.NeedsCsum, GSOSize: 1}, []byte{0x45, 0, 0, 0}, tun.ErrBadFrame},
	} {
		a, b := Pipe(1500, c.off)
		if err := a.Write(&c.h, [][]byte{c.b}); err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		a.Close()
		b.Close()
	}
	a, b := Pipe(1500, 0)
	defer a.Close()
	defer b.Close()
	a.Write(nil, [][]byte{{0x45, 1, 2}})
	if n, err := b.Read(new(tun.Header), make([]byte, 2), true); n != 2 || err != tun.ErrTooLong {
		t.Errorf("Read into a short buffer: %d, %v", n, err)
	}
}

// FuzzPipe: whatever is taken arrives as it was.
func FuzzPipe(f *testing.F) {
	f.Add(make([]byte, tun.HeaderLen), []byte{0x45, 1, 2, 3}, 2, uint8(all))
	f.Add([]byte{1, 4, 2, 0, 1, 0, 0, 0, 0, 0}, []byte{0x60, 1, 2, 3}, 0, uint8(all))
	f.Add(bytes.Repeat([]byte{0xff}, tun.HeaderLen), []byte{}, 0, uint8(0))
	f.Fuzz(func(t *testing.T, hdr, frame []byte, cut int, off uint8) {
		if len(hdr) < tun.HeaderLen || cut < 0 || cut > len(frame) {
			return
		}
		a, b := Pipe(1500, tun.Offload(off)&all)
		defer a.Close()
		defer b.Close()
		h := tun.ParseHeader(hdr)
		if a.Write(&h, [][]byte{frame[:cut], frame[cut:]}) != nil {
			return
		}
		var got tun.Header
		buf := make([]byte, tun.MaxFrame)
		n, err := b.Read(&got, buf, false)
		if err != nil || !bytes.Equal(buf[:n], frame) || got != h {
			t.Errorf("%v: % x with %+v became % x with %+v", err, frame, h, buf[:n], got)
		}
	})
}

func BenchmarkPipe(b *testing.B) {
	x, y := Pipe(1500, all)
	defer x.Close()
	defer y.Close()
	parts := [][]byte{bytes.Repeat([]byte{0x45}, 1500)}
	buf, h := make([]byte, tun.MaxFrame), new(tun.Header)
	b.ReportAllocs()
	for b.Loop() {
		if err := x.Write(h, parts); err != nil {
			b.Fatal(err)
		}
		if _, err := y.Read(h, buf, true); err != nil {
			b.Fatal(err)
		}
	}
}
