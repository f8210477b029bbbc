package sockstest

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// start gives a server that is checked for leaks when the test ends.
func start(t *testing.T, opts ...Option) *Server {
	t.Helper()
	testkit.CheckLeaks(t)
	s, err := Listen("tcp", "127.0.0.1:0", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

// request is a plain client: greeting, request, and the whole reply.
func request(t *testing.T, s *Server, cmd byte, dst Addr) (c *net.TCPConn, code byte, bound Addr) {
	t.Helper()
	nc, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	c = nc.(*net.TCPConn)
	c.SetDeadline(time.Now().Add(testkit.Patience))
	c.Write([]byte{5, 1, 0})
	var b [4]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil || b[1] != 0 {
		t.Fatalf("greeting: % x, %v", b[:2], err)
	}
	c.Write(appendAddr([]byte{5, cmd, 0}, dst))
	if _, err := io.ReadFull(c, b[:]); err != nil {
		t.Fatalf("reply: %v", err)
	}
	bound, err = readAddr(c, b[3])
	if err != nil {
		t.Fatal(err)
	}
	return c, b[1], bound
}

// far listens, connects a client through the server, and gives both ends.
func far(t *testing.T, s *Server) (near, farEnd *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, code, _ := request(t, s, CmdConnect, AddrFrom(unmap(ln.Addr())))
	if code != 0 {
		t.Fatalf("reply %d", code)
	}
	f, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	f.SetDeadline(time.Now().Add(testkit.Patience))
	return c, f.(*net.TCPConn)
}

func expect(t *testing.T, c net.Conn, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

func expectErr(t *testing.T, c net.Conn, want error) {
	t.Helper()
	n, err := c.Read(make([]byte, 10))
	if n != 0 || !errors.Is(err, want) {
		t.Fatalf("read %d bytes, %v; want %v", n, err, want)
	}
}

func TestHalfCloseBothWays(t *testing.T) {
	s := start(t)
	for _, nearFirst := range []bool{true, false} {
		a, b := far(t, s)
		if !nearFirst {
			a, b = b, a
		}
		a.Write([]byte("question"))
		a.CloseWrite()
		expect(t, b, "question")
		expectErr(t, b, io.EOF)
		testkit.Pace(20 * time.Millisecond) // half-closed for a while
		b.Write([]byte("answer"))
		expect(t, a, "answer")
		b.CloseWrite()
		expectErr(t, a, io.EOF)
	}
}

// TestReset resets either end in each state and sees the other end reset.
func TestReset(t *testing.T) {
	states := map[string]func(a, b *net.TCPConn){
		"established": func(a, b *net.TCPConn) {},
		"the other has sent FIN": func(a, b *net.TCPConn) {
			b.CloseWrite()
			expectErr(t, a, io.EOF)
		},
		"itself has sent FIN": func(a, b *net.TCPConn) {
			a.CloseWrite()
			expectErr(t, b, io.EOF)
			testkit.Settle(10*time.Millisecond, "the server is past the FIN")
		},
		"it sent data before": func(a, b *net.TCPConn) {
			a.Write(make([]byte, 100_000))
			expect(t, b, string(make([]byte, 10)))
		},
	}
	s := start(t)
	for name, prepare := range states {
		for _, near := range []bool{true, false} {
			a, b := far(t, s)
			if !near {
				a, b = b, a
			}
			prepare(a, b)
			a.SetLinger(0)
			a.Close()
			if name == "itself has sent FIN" {
				// b has read FIN and gets nothing more to read: its state tells, without a byte being sent.
				waitReset(t, name, b)
				continue
			}
			if _, err := io.Copy(io.Discard, b); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s, near=%v: read gave %v", name, near, err)
			}
		}
	}
}

// tcpState asks for the state of a connection and leaves its error where it is.
func tcpState(rc syscall.RawConn) (state uint8) {
	rc.Control(func(fd uintptr) {
		if i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = i.State
		}
	})
	return state
}

func waitReset(t *testing.T, name string, c *net.TCPConn) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if !testkit.Until(testkit.Patience, func() bool { return tcpState(rc) == tcpClose }) {
		t.Fatalf("%s: no reset", name)
	}
}

// TestResetWhileBlocked: b does not read, so that the server's write blocks when a is reset.
func TestResetWhileBlocked(t *testing.T) {
	s := start(t)
	a, b := far(t, s)
	a.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	io.Copy(a, neverEnding{})
	a.SetLinger(0)
	a.Close()
	waitReset(t, "blocked", b)
	if _, err := io.Copy(io.Discard, b); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read gave %v", err)
	}
}

type neverEnding struct{}

func (neverEnding) Read(b []byte) (int, error) { return len(b), nil }

func TestDialRefused(t *testing.T) {
	s := start(t)
	ln, _ := net.Listen("tcp", "127.0.0.1:0")
	at := unmap(ln.Addr())
	ln.Close()
	if _, code, _ := request(t, s, CmdConnect, AddrFrom(at)); code != 5 {
		t.Fatalf("reply %d", code)
	}
	if _, code, _ := request(t, s, 9, AddrFrom(at)); code != 7 {
		t.Fatalf("reply %d to an unknown command", code)
	}
}

// TestGoneWhileDialling: a client that goes away ends the server's dial.
func TestGoneWhileDialling(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s := start(t)
	// A backlog that is full keeps a dial pending.
	rc, _ := ln.(*net.TCPListener).SyscallConn()
	rc.Control(func(fd uintptr) { syscall.Listen(int(fd), 0) })
	for range 3 {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), 100*time.Millisecond)
		if err == nil {
			defer c.Close()
		}
	}
	c, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Write([]byte{5, 1, 0})
	c.Write(appendAddr([]byte{5, 1, 0}, AddrFrom(unmap(ln.Addr()))))
	testkit.Eventually(t, "the request", func() bool { return len(s.Requests()) > 0 })
	testkit.Never(t, 50*time.Millisecond, "the dial ended", func() bool { return s.Stats().Open != 1 })
	c.Close()
	if !testkit.Until(testkit.Patience, func() bool { return s.Stats().Open == 0 }) {
		t.Fatal("the server still dials")
	}
}

func udpClient(t *testing.T, bound Addr) *net.UDPConn {
	t.Helper()
	u, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(bound.IP, bound.Port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	u.SetDeadline(time.Now().Add(testkit.Patience))
	return u
}

func listenUDP(t *testing.T) *net.UDPConn {
	t.Helper()
	u, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	u.SetDeadline(time.Now().Add(testkit.Patience))
	return u
}

func recv(t *testing.T, u *net.UDPConn) (Addr, string) {
	t.Helper()
	b := make([]byte, 65536)
	n, err := u.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	src, payload, ok := parseDatagram(b[:n])
	if !ok {
		t.Fatalf("bad datagram % x", b[:n])
	}
	return src, string(payload)
}

func TestAssociate(t *testing.T) {
	s := start(t)
	_, code, bound := request(t, s, CmdAssociate, Addr{IP: netip.IPv4Unspecified()})
	if code != 0 {
		t.Fatalf("reply %d", code)
	}
	u := udpClient(t, bound)
	w1, w2 := listenUDP(t), listenUDP(t)
	fake := netip.MustParseAddrPort("203.0.113.9:6881")
	s.Redirect(fake, unmap(w2.LocalAddr()))

	u.Write(append([]byte{0, 0, 0}, append(appendAddr(nil, AddrFrom(unmap(w1.LocalAddr()))), "one"...)...))
	b := make([]byte, 100)
	n, from1, err := w1.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "one" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	// One mapping for all destinations.
	u.Write(append([]byte{0, 0, 0}, append(appendAddr(nil, AddrFrom(fake)), "two"...)...))
	n, from2, err := w2.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "two" || from1 != from2 {
		t.Fatalf("%q from %v, first %v, %v", b[:n], from2, from1, err)
	}
	w2.WriteToUDPAddrPort([]byte("re"), from2)
	if src, p := recv(t, u); src != AddrFrom(fake) || p != "re" {
		t.Fatalf("%q from %v", p, src)
	}
	// A stranger to the client is delivered with its true source.
	w3 := listenUDP(t)
	w3.WriteToUDPAddrPort([]byte("hello"), from1)
	if src, p := recv(t, u); src != AddrFrom(unmap(w3.LocalAddr())) || p != "hello" {
		t.Fatalf("%q from %v", p, src)
	}
	all, ok := s.WaitAssociations(1, testkit.Patience)
	if !ok {
		t.Fatal("no association")
	}
	all[0].Send(Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 9}, []byte("six"))
	if src, p := recv(t, u); src.String() != "[2001:db8::1]:9" || p != "six" {
		t.Fatalf("%q from %v", p, src)
	}
	all[0].Cut(FIN)
	if _, ok := s.WaitAssociations(0, testkit.Patience); !ok {
		t.Fatal("still associated")
	}
}
