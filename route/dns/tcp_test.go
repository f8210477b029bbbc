package dns

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// tcpServer is a Server with a pool and no resolver that answers, and a way to open connections to it.
func tcpServer(t *testing.T) (connect func() net.Conn, stop func()) {
	t.Helper()
	pool, err := NewPool(PoolConfig{V4: flow.Pool4, V6: flow.Pool6, TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{
		Dial: func(_ context.Context, _ Resolver, done func(int, error)) { done(-1, syscall.ECONNREFUSED) },
		Resolvers: []Resolver{
			OverTCP(netip.MustParseAddrPort("192.0.2.1:53")),
		}, Fake: FakeConfig{Pool: pool}, IdleClose: time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { _ = s.Run(ctx); close(ended) }()
	return func() net.Conn {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		s.ServeTCP(fds[1], netip.AddrPort{}, nil, nil)
		f := os.NewFile(uintptr(fds[0]), "app")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	}, func() { cancel(); <-ended }
}

func tcpQuestion(id uint16, name string, qtype byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, id)
	b = append(b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	b = append(appendWire(b, []byte(name)), 0, qtype, 0, 1)
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
}

func tcpAnswer(t *testing.T, c net.Conn) []byte {
	t.Helper()
	var n uint16
	if err := binary.Read(c, binary.BigEndian, &n); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTCP: more questions than may wait are sent before an answer is read, and the app ends its side: each has its answer,
// and then the connection ends.
func TestTCP(t *testing.T) {
	testkit.CheckLeaks(t)
	connect, stop := tcpServer(t)
	defer stop()
	c := connect()
	const count = 3 * askerPending
	go func() {
		for i := range uint16(count) {
			q := tcpQuestion(i, "www.example.com", typeA)
			if i%2 == 1 {
				q = tcpQuestion(i, "www.example.com", 15) // MX: no resolver answers
			}
			c.Write(q)
		}
		c.(*net.UnixConn).CloseWrite()
	}()
	got := map[uint16]bool{}
	for range count {
		b := tcpAnswer(t, c)
		id, rcode := binary.BigEndian.Uint16(b), b[3]&15
		if want := byte(id%2) * rcodeServer; got[id] || rcode != want {
			t.Errorf("question %d has rcode %d, want %d", id, rcode, want)
		}
		got[id] = true
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the last answer: %v", err)
	}
}

// TestTCPGarbage: what is no question ends the connection, and Run's end ends one that waits.
func TestTCPGarbage(t *testing.T) {
	testkit.CheckLeaks(t)
	connect, stop := tcpServer(t)
	defer stop()
	for _, junk := range []string{"\x00\x00", "\x00\x05hello", "\x00\x0c\x00\x00\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00"} {
		c := connect()
		if _, err := c.Write([]byte(junk)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%q: %d bytes, %v", junk, n, err)
		}
	}
	var all []net.Conn
	for range maxAskers {
		all = append(all, connect())
	}
	over := connect()
	if n, err := over.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("one connection too many: %d bytes, %v", n, err)
	}
	last := all[len(all)-1]
	if _, err := last.Write(tcpQuestion(7, "a.example", typeA)); err != nil {
		t.Fatal(err)
	}
	if b := tcpAnswer(t, last); b[1] != 7 {
		t.Errorf("got %x", b)
	}
	stop()
	if n, err := all[0].Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("after Run: %d bytes, %v", n, err)
	}
}

// TestTCPClaims: a length costs nothing until the bytes come, and a message of 64 KiB that does come is answered.
func TestTCPClaims(t *testing.T) {
	testkit.CheckLeaks(t)
	connect, stop := tcpServer(t)
	defer stop()
	var all []net.Conn
	for range maxAskers {
		all = append(all, connect())
	}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for _, c := range all {
		if _, err := c.Write([]byte{0xFF, 0xFF}); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Settle(100*time.Millisecond, "they read, and nothing tells when")
	if after := heap(); after > before+4<<20 {
		t.Errorf("%d connections that claim 64 KiB hold %d KiB", len(all), (after-before)>>10)
	}
	q := tcpQuestion(7, "a.example", typeA)[2:]
	if _, err := all[0].Write(append(q, make([]byte, 65535-len(q))...)); err != nil {
		t.Fatal(err)
	}
	if b := tcpAnswer(t, all[0]); b[1] != 7 || b[3]&15 != 0 {
		t.Errorf("got %x", b)
	}
}
