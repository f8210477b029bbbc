package tun

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// framePair returns the two ends of a socket for frames.
func framePair(t testing.TB) (near, far *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far = os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// echoer answers datagrams with a mark, until the device ends. leave, if not nil, may take a frame instead.
type echoer struct {
	mark  byte
	leave func(h Header, b []byte, p packet) bool
	ended chan error
}

func (e *echoer) run(d Device) {
	var h Header
	b := make([]byte, MaxFrame)
	for {
		n, err := d.Read(&h, b, true)
		if errors.Is(err, ErrAgain) {
			continue
		}
		if err != nil {
			e.ended <- err
			return
		}
		p, ok := parse(b[:n])
		if !ok || p.proto != protoUDP || e.leave != nil && e.leave(h, b[:n], p) {
			continue
		}
		answer := append([]byte{e.mark}, p.payload...)
		frame, _, _ := packet{src: p.dst, dst: p.src, proto: protoUDP, payload: answer}.marshal(false)
		_ = d.Write(&Header{}, [][]byte{frame})
	}
}

// While a device changes hands, no datagram is lost: those of the old process's sockets still reach it, the others
// the new process. When the new process ends, the old one learns it.
func TestHandover(t *testing.T) {
	old := kernelTUN(t, true, OffloadNoUSO)
	parts, err := Divide(old, 2)
	if err != nil {
		t.Fatal(err)
	}
	before := &echoer{mark: 'a', ended: make(chan error, 2)}
	for _, p := range parts {
		go before.run(p)
	}
	const stays, moves = 7, 8
	senders := startSenders(t, 6, stays, moves)
	defer senders.end()
	for i := range senders.last {
		senders.answeredBy(i, 'a')
	}

	files, err := Files(old)
	if err != nil {
		t.Fatal(err)
	}
	next, err := Adopt(files, Options{MTU: 1500, Offload: OffloadNoUSO})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	near, far := framePair(t)
	near2, far2 := framePair(t)
	if n := Sources(old); n != 2 {
		t.Fatalf("%d sources", n)
	}
	if err := Redirect(old, []*os.File{far, far2}); err != nil {
		t.Fatal(err)
	}
	after := &echoer{mark: 'b', ended: make(chan error, 1), leave: leavePort(t, stays, near, near2)}
	go after.run(next)
	for i := range senders.last {
		senders.answeredBy(i, "ab"[i%2])
	}
	senders.answeredBy(0, 'a')
	senders.end()
	if n := senders.lost.Load(); n != 0 {
		t.Errorf("%d datagrams were lost", n)
	}
	if err := Redirect(old, nil); err == nil {
		t.Error("it was redirected to nothing")
	}
	near.Close()
	near2.Close()
	for range parts {
		if err := <-before.ended; !errors.Is(err, ErrLeft) {
			t.Errorf("it ended with %v", err)
		}
	}
	old.Close()
	next.Close()
	if err := <-after.ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("the new one ended with %v", err)
	}
}

// senders are sockets of the app that send to two ports in turn.
type senders struct {
	t    *testing.T
	last []atomic.Uint32 // who answered each of them
	lost atomic.Int64
	stop chan struct{}
	once sync.Once
	all  sync.WaitGroup
}

func startSenders(t *testing.T, n int, ports ...uint16) *senders {
	t.Helper()
	s := &senders{t: t, last: make([]atomic.Uint32, n), stop: make(chan struct{})}
	for i := range s.last {
		c := dialUDP(t, ports[i%len(ports)])
		s.all.Go(func() { pingPong(t, c, &s.last[i], &s.lost, s.stop) })
	}
	return s
}

// end stops the senders. It may be called twice.
func (s *senders) end() {
	s.once.Do(func() { close(s.stop) })
	s.all.Wait()
}

// answeredBy waits until a sender has an answer with a mark.
func (s *senders) answeredBy(i int, mark byte) {
	s.t.Helper()
	testkit.Eventually(s.t, "an answer", func() bool { return byte(s.last[i].Load()) == mark })
}

// leavePort leaves the frames to a port to another process, by the first socket if the app's port is odd.
func leavePort(t *testing.T, port uint16, odd, even *os.File) func(h Header, b []byte, p packet) bool {
	return func(h Header, b []byte, p packet) bool {
		if p.dst.Port() != port {
			return false
		}
		var hdr [HeaderLen]byte
		h.Put(hdr[:])
		to := odd
		if p.src.Port()%2 == 0 {
			to = even
		}
		if _, err := to.Write(append(hdr[:], b...)); err != nil {
			t.Error(err)
		}
		return true
	}
}

// pingPong sends numbered datagrams one after another, each after the answer to the one before, and stores who answered.
func pingPong(t *testing.T, c net.Conn, by *atomic.Uint32, lost *atomic.Int64, stop <-chan struct{}) {
	b, in := make([]byte, 8), make([]byte, 16)
	for i := uint64(0); ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		binary.BigEndian.PutUint64(b, i)
		if _, err := c.Write(b); err != nil {
			t.Error(err)
			return
		}
		_ = c.SetReadDeadline(time.Now().Add(testkit.Patience))
		n, err := c.Read(in)
		if err != nil || n != 9 || binary.BigEndian.Uint64(in[1:]) != i {
			lost.Add(1)
			return
		}
		by.Store(uint32(in[0]))
	}
}
