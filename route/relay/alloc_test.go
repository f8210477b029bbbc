package relay

import (
	"io"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// A turn of a stream, either way, and datagrams both ways allocate nothing.
func TestTurnAllocatesNothing(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	l, err := NewLoop(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &plainStream{data: make([]byte, 20_000)}
	r := l.Start(&plainRequest{s: s}, loop.Unwatched(pair[0]), nil)
	l.Step(false)
	msg, in := make([]byte, 3000), make([]byte, 64<<10)
	if n := testing.AllocsPerRun(200, func() {
		unix.Write(pair[1], msg)
		if _, err := l.Step(true); err != nil {
			t.Fatal(err)
		}
		s.unread = len(s.data)
		r.Ready(flow.Readable)
		if _, err := l.Step(true); err != nil {
			t.Fatal(err)
		}
		for n, err := unix.Read(pair[1], in); err == nil && n > 0; n, err = unix.Read(pair[1], in) {
		}
	}); n != 0 {
		t.Errorf("%v allocations for a turn of a stream", n)
	}
	if up, down := r.Bytes(); up < 200*20_000 || down < 200*3000 {
		t.Errorf("%d bytes went up, %d down", up, down)
	}

	srv := udpServer(t, "udp4", "127.0.0.1:0")
	fd := udpSocket(t, unix.AF_INET, addrOf(srv))
	sa, _ := unix.Getsockname(fd)
	got := 0
	k := openLink(t, l, fd, testCodec{}, func(ps []flow.Packet) { got += len(ps) })
	l.Step(false)
	ps := make([]flow.Packet, 20)
	for i := range ps {
		ps[i] = flow.Packet{Dst: netip.MustParseAddrPort("192.0.2.1:1"), Payload: make([]byte, 100+i/10*500)}
	}
	d := append(testCodec{}.AppendHeader(nil, ps[0].Dst), make([]byte, 1200)...)
	raw, _ := srv.SyscallConn()
	raw.Control(func(s uintptr) {
		if n := testing.AllocsPerRun(200, func() {
			unix.Sendto(int(s), d, 0, sa)
			k.Got |= sockIn
			k.Turn()
			k.Send(ps)
		}); n >= 2 { // that of Sendto is the test's
			t.Errorf("%v allocations for datagrams", n)
		}
	})
	if got == 0 || k.Stats().Sent == 0 {
		t.Errorf("%d received, %d sent", got, k.Stats().Sent)
	}
}

// plainStream is an app that takes all and has unread bytes; it allocates nothing.
type plainStream struct {
	flow.Stream
	data   []byte
	unread int
}

func (s *plainStream) ReadTo(w io.Writer) (int, error) {
	if s.unread == 0 {
		return 0, flow.ErrAgain
	}
	n, _ := w.Write(s.data[:s.unread])
	s.unread -= n
	return n, nil
}

func (s *plainStream) WriteFrom(p flow.Payload) (int, error) {
	return p.Read(s.data[:min(p.Len(), len(s.data))])
}
func (s *plainStream) Abort()       {}
func (s *plainStream) Close() error { return nil }

type plainRequest struct {
	flow.StreamRequest
	s *plainStream
}

func (q *plainRequest) Accept(l flow.Listener) { l.Opened(q.s, nil) }
