package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// pair is a connection of the app and its far end.
func pair(t testing.TB, a *app, host string) (app, far *net.TCPConn) {
	t.Helper()
	l, dst := listenTCP(t, host)
	defer l.Close()
	app = a.tcp(dst)
	l.SetDeadline(time.Now().Add(testkit.Patience))
	c, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return app, c
}

// eachFamily runs a test over IPv4 and IPv6.
func eachFamily(t *testing.T, f func(t *testing.T, host string)) {
	t.Run("IPv4", func(t *testing.T) { f(t, world4) })
	t.Run("IPv6", func(t *testing.T) { f(t, world6) })
}

// eachOffload runs f with each value of --offload: super-segments of TCP and UDP, of TCP alone, none.
func eachOffload(t *testing.T, f func(t *testing.T, offload string)) {
	for _, offload := range []string{"full", "nouso", "off"} {
		t.Run("offload="+offload, func(t *testing.T) { f(t, offload) })
	}
}

func TestStreams(t *testing.T) {
	eachApart(t, func(t *testing.T, offload string) {
		proxy := listenSOCKS(t)
		a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
		eachFamily(t, func(t *testing.T, host string) {
			t.Run("bulk", func(t *testing.T) { testBulk(t, a, host) })
			t.Run("server first", func(t *testing.T) { testServerFirst(t, a, host) })
			t.Run("halfclose", func(t *testing.T) { testHalfClose(t, a, host) })
			t.Run("rst", func(t *testing.T) { testResets(t, a, host) })
			t.Run("source port to several targets", func(t *testing.T) { testOneSourcePort(t, a, host) })
			t.Run("port used again", func(t *testing.T) { testPortUsedAgain(t, a, host) })
		})
	})
}

// testBulk: every byte arrives, in order, both ways at once.
func testBulk(t *testing.T, a *app, host string) {
	app, far := pair(t, a, host)
	bulk(t, app, far)
}

func bulk(t *testing.T, app, far *net.TCPConn) {
	t.Helper()
	size := 24 << 20
	if raceEnabled {
		size /= 4 // more than all buffers together; a byte takes many times as long
	}
	data := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; i+8 <= len(data); i += 8 {
		v := r.Uint64()
		for j := range 8 {
			data[i+j] = byte(v >> (8 * j))
		}
	}
	want := sha256.Sum256(data)
	var wg sync.WaitGroup
	for _, way := range []struct{ from, to *net.TCPConn }{{app, far}, {far, app}} {
		wg.Go(func() {
			if _, err := way.from.Write(data); err != nil {
				t.Error("write:", err)
			}
			if err := way.from.CloseWrite(); err != nil {
				t.Error("shutdown:", err)
			}
		})
		wg.Go(func() {
			h := sha256.New()
			way.to.SetReadDeadline(time.Now().Add(4 * testkit.Patience))
			n, err := io.Copy(h, way.to)
			if err != nil || n != int64(size) {
				t.Errorf("%d of %d bytes arrived: %v", n, size, err)
			} else if !bytes.Equal(h.Sum(nil), want[:]) {
				t.Error("the bytes are not those that were sent")
			}
		})
	}
	wg.Wait()
}

// testServerFirst: the far end speaks first, as FTP and SSH do.
func testServerFirst(t *testing.T, a *app, host string) {
	l, dst := listenTCP(t, host)
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Write([]byte("220 hello\r\n"))
			c.Close()
		}
	}()
	c := a.tcp(dst)
	c.SetReadDeadline(time.Now().Add(testkit.Patience))
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "220 hello\r\n" {
		t.Errorf("read %q, %v", b, err)
	}
}

// testHalfClose: FIN of one side is EOF at the other, and the other way still moves, however late.
func testHalfClose(t *testing.T, a *app, host string) {
	app, far := pair(t, a, host)
	for _, way := range []struct {
		name     string
		from, to *net.TCPConn
	}{{"by the app", app, far}, {"by the far end", far, app}} {
		app, far = nil, nil
		if way.name == "by the far end" {
			way.to, way.from = pair(t, a, host)
		}
		way.to.SetDeadline(time.Now().Add(2 * testkit.Patience))
		way.from.SetDeadline(time.Now().Add(2 * testkit.Patience))
		way.from.Write([]byte("question"))
		if err := way.from.CloseWrite(); err != nil {
			t.Fatal(way.name, err)
		}
		if b, err := io.ReadAll(way.to); err != nil || string(b) != "question" {
			t.Fatalf("%s: read %q, %v", way.name, b, err)
		}
		testkit.Pace(1500 * time.Millisecond) // half-closed for a while
		for range 3 {
			testkit.Pace(100 * time.Millisecond)
			if _, err := way.to.Write([]byte("answer")); err != nil {
				t.Fatalf("%s: write after the other's FIN: %v", way.name, err)
			}
		}
		way.to.CloseWrite()
		if b, err := io.ReadAll(way.from); err != nil || string(b) != "answeransweranswer" {
			t.Errorf("%s: read %q, %v after its own FIN", way.name, b, err)
		}
	}
}

var errGotThrough = errors.New("the other side saw FIN, want ECONNRESET")

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// ends are the two ends of a connection through viasocks: who resets, and who must see it.
type ends struct{ mine, other *net.TCPConn }

func settleEnds() { testkit.Settle(50*time.Millisecond, "the other side has it") }

func wantReset(t *testing.T, c *net.TCPConn, before string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(testkit.Patience))
	b, err := io.ReadAll(c)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the other side sees %v after %q, want ECONNRESET", err, b)
	}
	if string(b) != before {
		t.Errorf("read %q before the reset, want %q", b, before)
	}
}

// resetStates are the states in which a connection is reset. In calm nothing is taken when every buffer is full.
var resetStates = []struct {
	name string
	do   func(t *testing.T, e ends, calm time.Duration) error
}{
	{"ESTABLISHED", func(t *testing.T, e ends, _ time.Duration) error {
		reset(e.mine)
		wantReset(t, e.other, "")
		return nil
	}},
	{"ESTABLISHED, data on the way", func(t *testing.T, e ends, _ time.Duration) error {
		e.mine.Write([]byte("before"))
		settleEnds()
		reset(e.mine)
		e.other.SetReadDeadline(time.Now().Add(testkit.Patience))
		// A kernel that got the RST before the read throws the data away, as it would directly; the error must be
		// there, and nothing but a prefix before it.
		b, err := io.ReadAll(e.other)
		if !errors.Is(err, syscall.ECONNRESET) || (len(b) > 0 && string(b) != "before") {
			t.Errorf("read %q, %v", b, err)
		}
		return nil
	}},
	{"ESTABLISHED, with unread data", func(t *testing.T, e ends, _ time.Duration) error {
		e.other.Write([]byte("never read"))
		settleEnds()
		reset(e.mine)
		wantReset(t, e.other, "")
		return nil
	}},
	{"CLOSE_WAIT: the other side sent FIN", func(t *testing.T, e ends, _ time.Duration) error {
		e.other.CloseWrite()
		settleEnds()
		reset(e.mine)
		wantReset(t, e.other, "")
		return nil
	}},
	{"after its own FIN (FIN_WAIT_2)", func(t *testing.T, e ends, _ time.Duration) error {
		e.mine.CloseWrite()
		settleEnds()
		if _, err := io.ReadAll(e.other); err != nil {
			t.Errorf("FIN was seen as %v", err)
		}
		reset(e.mine)
		// The other side learns of it when it writes, or by the error on its socket.
		e.other.SetWriteDeadline(time.Now().Add(testkit.Patience))
		var err error
		testkit.Eventually(t, "the other side's writes to fail", func() bool {
			_, err = e.other.Write(make([]byte, 1000))
			return err != nil
		})
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("the other side's writes end in %v", err)
		}
		return nil
	}},
	{"FIN_WAIT_1: its FIN waits behind data", func(t *testing.T, e ends, calm time.Duration) error {
		// Until nothing at all is taken for a while: the other side does not read, and every buffer is full. Else the FIN
		// would get through.
		fill := make([]byte, 64<<10)
		for {
			e.mine.SetWriteDeadline(time.Now().Add(calm))
			if n, err := e.mine.Write(fill); n == 0 && err != nil {
				break
			}
		}
		e.mine.CloseWrite()
		settleEnds()
		reset(e.mine)
		e.other.SetReadDeadline(time.Now().Add(2 * testkit.Patience))
		_, err := io.Copy(io.Discard, e.other)
		if err == nil {
			return errGotThrough
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the other side sees %v, want ECONNRESET", err)
		}
		return nil
	}},
}

// testResets: RST of one side is RST at the other in every state, never FIN, and what came before it is read first.
func testResets(t *testing.T, a *app, host string) {
	for _, s := range resetStates {
		for _, by := range []string{"the app", "the far end"} {
			t.Run(s.name+"/by "+by, func(t *testing.T) {
				// A machine that stalls looks like full buffers.
				for calm := 500 * time.Millisecond; ; calm *= 2 {
					mine, other := pair(t, a, host)
					if by == "the far end" {
						mine, other = other, mine
					}
					err := s.do(t, ends{mine, other}, calm)
					if err == nil {
						break
					}
					if calm > 5*time.Second {
						t.Fatal(err)
					}
				}
			})
		}
	}
}

// bindPort binds a fresh socket of the app to a source port.
func bindPort(t *testing.T, a *app, dst netip.AddrPort, port uint16) int {
	t.Helper()
	fd := a.socket(family(dst), unix.SOCK_STREAM)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	any := netip.IPv4Unspecified()
	if dst.Addr().Is6() {
		any = netip.IPv6Unspecified()
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(any, port))); err != nil {
		t.Fatal(err)
	}
	return fd
}

// testOneSourcePort: one source port talks to several targets at once.
func testOneSourcePort(t *testing.T, a *app, host string) {
	const port = 20123 // the kernel gives none below 32768, so no other socket has it
	for range 3 {
		l, dst := listenTCP(t, host)
		fd := bindPort(t, a, dst, port)
		if err := unix.Connect(fd, sockaddr(dst)); err != nil {
			t.Fatalf("connect from port %d: %v", port, err)
		}
		c := fileConn(t, fd)
		defer c.Close()
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		c.Write([]byte("x"))
		far.SetReadDeadline(time.Now().Add(testkit.Patience))
		if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
}

// testPortUsedAgain: the same 4-tuple is used again at once after the far end closed first, so that the app's kernel
// keeps no TIME_WAIT, and after a reset.
func testPortUsedAgain(t *testing.T, a *app, host string) {
	l, dst := listenTCP(t, host)
	const port = 20321 // see testOneSourcePort
	for i := range 6 {
		fd := bindPort(t, a, dst, port)
		var err error
		testkit.Until(testkit.Patience, func() bool { // the last acknowledgement may still be on its way: LAST_ACK
			err = unix.Connect(fd, sockaddr(dst))
			return !errors.Is(err, unix.EADDRNOTAVAIL)
		})
		if err != nil {
			t.Fatalf("connection %d from port %d: %v", i, port, err)
		}
		c := fileConn(t, fd).(*net.TCPConn)
		c.SetDeadline(time.Now().Add(testkit.Patience))
		far, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			far.Close()
			if _, err := io.ReadAll(c); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			c.Close()
			testkit.Settle(20*time.Millisecond, "the last ACK has come")
		} else {
			reset(c)
			io.ReadAll(far)
			far.Close()
		}
	}
}

// TestNettest runs the standard conformance test of net.Conn through the TUN.
func TestNettest(t *testing.T) {
	eachApart(t, func(t *testing.T, offload string) {
		proxy := listenSOCKS(t)
		a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
		eachFamily(t, func(t *testing.T, host string) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				app, far := pair(t, a, host)
				return app, far, func() { app.Close(); far.Close() }, nil
			})
		})
	})
}
