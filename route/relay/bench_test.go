package relay

import (
	"bytes"
	"io"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// BenchmarkRoundTrip: an app's small request and the upstream's answer, all on one machine.
func BenchmarkRoundTrip(b *testing.B) {
	l := newLoop(b)
	f := startFlow(b, l)
	go echo(f.up)
	req := [][]byte{bytes.Repeat([]byte("x"), 64)}
	b.ReportAllocs()
	for b.Loop() {
		f.app.send(req[0])
		f.app.mu.Lock()
		for len(f.app.out) < 64 {
			f.app.cond.Wait()
		}
		f.app.out = f.app.out[:0]
		f.app.mu.Unlock()
	}
	f.Abort()
	f.result(b)
}

// BenchmarkUp: super-segments of the app to the upstream; no allocation for each.
func BenchmarkUp(b *testing.B) {
	f := startFlow(b, newLoop(b))
	go io.Copy(io.Discard, struct{ io.Reader }{f.up})
	seg := make([]byte, 1<<16)
	b.SetBytes(int64(len(seg)))
	b.ReportAllocs()
	s := f.app
	for b.Loop() {
		s.mu.Lock()
		for len(s.in) > 16 {
			s.cond.Wait()
		}
		if cap(s.in) < 32 {
			s.in = append(make([][]byte, 0, 4096), s.in...)
		}
		s.in = append(s.in, seg)
		s.mu.Unlock()
		f.Ready(flow.Readable)
	}
	f.Abort()
	f.result(b)
}

// BenchmarkDown: bulk from the upstream into the stack's buffers.
func BenchmarkDown(b *testing.B) {
	s := newStream()
	s.discard = true
	f := startWith(b, newLoop(b), s, nil)
	chunk := make([]byte, 1<<18)
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.up.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	f.Abort()
	f.result(b)
}

// BenchmarkTurn is one turn of the loop's code and its system calls alone: 64 bytes down.
func BenchmarkTurn(b *testing.B) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	l, err := NewLoop(Config{})
	if err != nil {
		b.Fatal(err)
	}
	s := newStream()
	s.discard = true
	r := l.Start(&fakeRequest{s: s}, loop.Unwatched(pair[0]), nil)
	l.Step(false)
	msg := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		unix.Write(pair[1], msg)
		if _, err := l.Step(true); err != nil {
			b.Fatal(err)
		}
	}
	if _, down := r.Bytes(); down != uint64(64*b.N) {
		b.Errorf("%d bytes came", down)
	}
	unix.Close(pair[1])
	l.Close()
}

func BenchmarkSend(b *testing.B) {
	equal := func(int) int { return 1200 }
	for _, c := range []struct {
		name string
		size func(i int) int
		gso  bool
	}{
		{"equal", equal, true},
		{"mixed", func(i int) int { return 200 + i%7*100 }, true},
		{"equal-without-GSO", equal, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			srv := udpServer(b, "udp4", "127.0.0.1:0") // does not read: the cost of sending alone
			srv.SetReadBuffer(4096)
			l := newLoop(b)
			l.SetGSO(c.gso)
			k := openLink(b, l, udpSocket(b, unix.AF_INET, addrOf(srv)), testCodec{}, func([]flow.Packet) {})
			ps := make([]flow.Packet, 64)
			for i := range ps {
				ps[i] = flow.Packet{Dst: netip.MustParseAddrPort("192.0.2.1:1"), Payload: make([]byte, c.size(i))}
			}
			b.ReportAllocs()
			for b.Loop() {
				k.Send(ps)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(ps)), "ns/datagram")
		})
	}
}

// BenchmarkReceive is the loop's turn for 32 datagrams, which are sent outside of the clock.
func BenchmarkReceive(b *testing.B) {
	srv := udpServer(b, "udp4", "127.0.0.1:0")
	l, err := NewLoop(Config{})
	if err != nil {
		b.Fatal(err)
	}
	fd := udpSocket(b, unix.AF_INET, addrOf(srv))
	sa, _ := unix.Getsockname(fd)
	n := 0
	k := openLink(b, l, fd, testCodec{}, func(ps []flow.Packet) { n += len(ps) })
	l.Step(false)
	d := append(testCodec{}.AppendHeader(nil, netip.MustParseAddrPort("192.0.2.1:1")), make([]byte, 1200)...)
	raw, _ := srv.SyscallConn()
	b.ReportAllocs()
	raw.Control(func(s uintptr) {
		for b.Loop() {
			b.StopTimer()
			for range 32 {
				unix.Sendto(int(s), d, 0, sa)
			}
			b.StartTimer()
			k.Got |= sockIn
			k.Turn()
		}
	})
	if n != 32*b.N {
		b.Errorf("%d datagrams came, %d were sent", n, 32*b.N)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/datagram")
	l.Close()
}
