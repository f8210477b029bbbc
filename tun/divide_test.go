package tun

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestDivide: each kind of device has parts that together give every frame, once each, and a flow's frames go to the part that
// last wrote to it. Closing the device ends all reads and closes every file.
func TestDivide(t *testing.T) {
	for _, c := range devices {
		t.Run(c.name, func(t *testing.T) {
			fds := testkit.CountFiles(t)
			d := openKernelTUN(t, c.vnet, c.n, Options{MTU: 1500, Offload: c.mode})
			name, off := d.Name(), d.Offload()
			parts, err := Divide(d, 3)
			if err != nil {
				t.Fatal(err)
			}
			want := 3
			if !c.vnet || c.n == 1 {
				want = 1
			}
			if len(parts) != want {
				t.Fatalf("%d parts, want %d", len(parts), want)
			}
			x := divided{parts: parts, frames: make(chan divideFrame, 1000), ends: make(chan error, len(parts))}
			for i, p := range parts {
				if p.Name() != name || p.MTU() != 1500 || p.Offload() != off {
					t.Errorf("part %d: %s, %d, %b", i, p.Name(), p.MTU(), p.Offload())
				}
				x.readers.Go(func() { x.read(i) })
			}
			x.follow(t)
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			x.closed(t)
			if err := d.Close(); err != nil {
				t.Error("the second Close:", err)
			}
			testkit.AwaitFiles(t, fds+40) // the UDP sockets are still open
		})
	}
}

// divideFrame is a datagram to port 9, and the part that it was read from.
type divideFrame struct {
	part int
	src  netip.AddrPort
}

// divided is a device whose parts are all read.
type divided struct {
	parts   []Part
	frames  chan divideFrame
	ends    chan error
	readers sync.WaitGroup
}

func (x *divided) read(i int) {
	b, h := make([]byte, MaxFrame), new(Header)
	for {
		n, err := x.parts[i].Read(h, b, true)
		if err != nil {
			x.ends <- err
			return
		}
		if f, ok := parse(b[:n]); ok && f.proto == protoUDP && f.dst.Port() == 9 {
			x.frames <- divideFrame{i, f.src}
		}
	}
}

func (x *divided) next(t *testing.T) divideFrame {
	t.Helper()
	select {
	case g := <-x.frames:
		return g
	case <-time.After(testkit.Patience):
		t.Fatal("the frame did not come")
		panic("unreachable")
	}
}

// follow writes to another part than the kernel's hash chose for a flow, whose frames then come from there.
func (x *divided) follow(t *testing.T) {
	t.Helper()
	used := map[int]bool{}
	for range 40 {
		u := dialUDP(t, 9)
		if _, err := u.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		g := x.next(t)
		used[g.part] = true
		to := (g.part + 1) % len(x.parts)
		f, _, _ := packet{src: netip.AddrPortFrom(far4, 9), dst: g.src, proto: protoUDP, payload: []byte("y")}.marshal(false)
		if err := x.parts[to].Write(&Header{}, [][]byte{f}); err != nil {
			t.Fatal(err)
		}
		if _, err := u.Write([]byte("z")); err != nil {
			t.Fatal(err)
		}
		if h := x.next(t); h.part != to || h.src != g.src {
			t.Errorf("after a write to part %d: %v, before it %v", to, h, g)
		}
	}
	if len(used) != len(x.parts) {
		t.Errorf("of %d parts only %v had frames", len(x.parts), used)
	}
}

// closed: all reads end, and writes fail, when the device is closed.
func (x *divided) closed(t *testing.T) {
	t.Helper()
	x.readers.Wait()
	for range x.parts {
		if err := <-x.ends; !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	}
	for _, p := range x.parts {
		p.Wake()
		if err := p.Write(&Header{}, [][]byte{{0x45}}); !errors.Is(err, os.ErrClosed) && !errors.Is(err, ErrBadFrame) {
			t.Errorf("write to a part of a closed device: %v", err)
		}
	}
}

// TestDivideFails: less than one part is refused, and the device closed.
func TestDivideFails(t *testing.T) {
	d := kernelTUN(t, true, OffloadFull)
	if _, err := Divide(d, 0); err == nil {
		t.Error("no parts")
	}
	if _, err := d.Read(new(Header), make([]byte, MaxFrame), false); !errors.Is(err, os.ErrClosed) {
		t.Error("the device is open:", err)
	}
}

// TestWake: a Read that waits returns ErrAgain when it is woken, whether Wake came before it or after, however often, and
// never on the other part.
func TestWake(t *testing.T) {
	d := kernelTUN(t, true, OffloadFull)
	parts, err := Divide(d, 2)
	if err != nil {
		t.Fatal(err)
	}
	reads := make(chan error, 8192)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer d.Close()
	wg.Go(func() {
		b := make([]byte, MaxFrame)
		for {
			_, err := parts[0].Read(new(Header), b, true)
			if err == nil {
				continue // the kernel's own: router solicitations
			}
			reads <- err
			if !errors.Is(err, ErrAgain) {
				return
			}
		}
	})
	for i := range 2000 {
		if i%3 == 0 {
			testkit.Settle(50*time.Microsecond, "the read waits")
		}
		parts[0].Wake()
		if i%2 == 0 {
			parts[0].Wake()
		}
		select {
		case err := <-reads:
			if !errors.Is(err, ErrAgain) {
				t.Fatal(err)
			}
		case <-time.After(testkit.Patience):
			t.Fatalf("%d: the read was not woken", i)
		}
	}
	other := make(chan error, 1)
	go func() {
		b := make([]byte, MaxFrame)
		for {
			if _, err := parts[1].Read(new(Header), b, true); err != nil {
				other <- err
				return
			}
		}
	}()
	testkit.Never(t, 10*time.Millisecond, "the other part was woken", func() bool { return len(other) != 0 })
	d.Close()
	for err := range reads {
		if errors.Is(err, os.ErrClosed) {
			break
		}
	}
	<-other
}
