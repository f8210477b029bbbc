package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// setup gives a Dialer and a server; when the test ends both are closed and nothing may be left.
func setup(t testing.TB, o Options, opts ...sockstest.Option) (*Dialer, *Client, *sockstest.Server) {
	t.Helper()
	testkit.CheckLeaks(t)
	srv, err := sockstest.Listen("tcp", "127.0.0.1:0", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	d := newDialer(t, o)
	return d, d.Client(mustServer(t, srv.URL())), srv
}

func mustServer(t testing.TB, url string) Server {
	t.Helper()
	s, err := ParseServer(url)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

type dialed struct {
	fd  int
	err error
}

// connect is a blocking Connect.
func connect(t testing.TB, c *Client, ctx context.Context, dst Addr) (int, error) {
	t.Helper()
	ch := make(chan dialed, 2)
	c.Connect(ctx, on(c.d), dst, func(s loop.Socket, err error) { ch <- dialed{s.Release(), err} })
	select {
	case r := <-ch:
		return r.fd, r.err
	case <-time.After(testkit.Patience):
		t.Fatal("done is not called")
		return -1, nil
	}
}

func associate(t testing.TB, c *Client, ctx context.Context) (*Association, error) {
	t.Helper()
	type result struct {
		a   *Association
		err error
	}
	ch := make(chan result, 2)
	c.Associate(ctx, on(c.d), func(a *Association, err error) { ch <- result{a, err} })
	select {
	case r := <-ch:
		return r.a, r.err
	case <-time.After(testkit.Patience):
		t.Fatal("done is not called")
		return nil, nil
	}
}

// conn makes a net.Conn of a descriptor, so that a test can read with a deadline.
func conn(t testing.TB, fd int) net.Conn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(testkit.Patience))
	return c
}

// echo listens, says hello first, and sends back what it gets.
func echo(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.Write([]byte("hello "))
				io.Copy(struct{ io.Writer }{c}, c) // not by splice, whose pipes are kept
			})
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

func TestConnect(t *testing.T) {
	t.Run("no login", func(t *testing.T) { testConnect(t, false) })
	t.Run("login", func(t *testing.T) { testConnect(t, true) })
}

func testConnect(t *testing.T, login bool) {
	var opts []sockstest.Option
	if login {
		opts = append(opts, sockstest.WithAuth("alice", "secret"))
	}
	var marked atomic.Int32
	_, c, srv := setup(t, Options{PrepareSocket: func(fd int) error { marked.Add(1); return nil }}, opts...)
	if login {
		s, err := c.Server().WithCredentials("alice", "secret")
		if err != nil {
			t.Fatal(err)
		}
		c = c.d.Client(s)
	}
	fd, err := connect(t, c, context.Background(), AddrFrom(echo(t)))
	if err != nil {
		t.Fatal(err)
	}
	if v, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY); v != 1 || err != nil {
		t.Errorf("TCP_NODELAY is %d, %v", v, err)
	}
	if fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); fl&unix.O_NONBLOCK == 0 || err != nil {
		t.Errorf("the socket blocks: %x, %v", fl, err)
	}
	if fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fl&unix.FD_CLOEXEC == 0 || err != nil {
		t.Errorf("the socket is inherited: %x, %v", fl, err)
	}
	nc := conn(t, fd)
	nc.Write([]byte("world"))
	b := make([]byte, 11)
	if _, err := io.ReadFull(nc, b); err != nil || string(b) != "hello world" {
		t.Fatalf("%q, %v", b, err)
	}
	nc.Close()
	if marked.Load() != 1 {
		t.Errorf("PrepareSocket saw %d sockets", marked.Load())
	}
	if r := srv.Requests(); len(r) != 1 || r[0].Cmd != sockstest.CmdConnect || (r[0].User == "alice") != login {
		t.Errorf("requests: %+v", r)
	}
}

// TestBytesBehindTheReply: what the target says first comes in one segment with the reply, whatever its address type,
// and is read by the receiver.
func TestBytesBehindTheReply(t *testing.T) {
	_, c, srv := setup(t, Options{})
	dst := AddrFrom(echo(t))
	for _, bound := range []sockstest.Addr{
		{IP: netip.MustParseAddr("10.0.0.1"), Port: 1}, {IP: netip.MustParseAddr("2001:db8::1"), Port: 1},
		{Name: "a", Port: 1}, {Name: strings.Repeat("n", 255), Port: 1},
	} {
		srv.SetFault(func(sockstest.Request) sockstest.Fault {
			f := sockstest.Bound(bound)
			f.Extra = []byte("220 first\r\n")
			return f
		})
		fd, err := connect(t, c, context.Background(), dst)
		if err != nil {
			t.Fatal(err)
		}
		nc := conn(t, fd)
		b := make([]byte, 17)
		if _, err := io.ReadFull(nc, b); err != nil || string(b) != "220 first\r\nhello " {
			t.Errorf("%v: %q, %v", bound, b, err)
		}
		nc.Close()
	}
}

// hastyHandshake is the timeout of clients that are to run into it.
const hastyHandshake = 400 * time.Millisecond

func serverError(op string, cause error) func(error) bool {
	return func(err error) bool {
		var se *ServerError
		return errors.As(err, &se) && se.Op == op && errors.Is(err, cause)
	}
}

func isError(want error) func(error) bool {
	return func(err error) bool { return errors.Is(err, want) }
}

func replyIs(want Reply) func(error) bool {
	return func(err error) bool {
		var r Reply
		return errors.As(err, &r) && r == want
	}
}

type faultCase struct {
	name  string
	stage sockstest.Stage
	fault sockstest.Fault
	late  bool // only the handshake's timeout ends it: this one's client has a short one
	want  func(error) bool
}

func faultCases() []faultCase {
	request, greeting := sockstest.AtRequest, sockstest.AtGreeting
	drip := sockstest.LongName() // it would take a quarter of a minute
	drip.Drip = hastyHandshake / 6
	return []faultCase{
		{"general failure", request, sockstest.Reply(1), false, replyIs(ReplyGeneralFailure)},
		{"not allowed", request, sockstest.Reply(2), false, replyIs(ReplyNotAllowed)},
		{"net unreachable", request, sockstest.Reply(3), false, replyIs(ReplyNetUnreachable)},
		{"host unreachable", request, sockstest.Reply(4), false, replyIs(ReplyHostUnreachable)},
		{"refused", request, sockstest.Reply(5), false, replyIs(ReplyRefused)},
		{"TTL expired", request, sockstest.Reply(6), false, replyIs(ReplyTTLExpired)},
		{"no such command", request, sockstest.Reply(7), false, replyIs(ReplyCommandNotSupported)},
		{"no such address type", request, sockstest.Reply(8), false, replyIs(ReplyAddrTypeNotSupported)},
		{"unassigned", request, sockstest.Reply(200), false, replyIs(200)},
		{"silence", request, sockstest.Silence(), true, isError(ErrSilent)},
		{"close", request, sockstest.EarlyClose(), false, isError(ErrEnded)},
		{"reset", request, sockstest.EarlyReset(), false, serverError(OpHandshake, syscall.ECONNRESET)},
		{"garbage", request, sockstest.Garbage(), false, serverError(OpHandshake, ErrMalformed)},
		{"version", request, sockstest.BadVersion(), false, serverError(OpHandshake, ErrMalformed)},
		{"address type", request, sockstest.BadAddrType(), false, serverError(OpHandshake, ErrMalformed)},
		{"half, then close", request, sockstest.Half(7, sockstest.FIN), false, serverError(OpHandshake, io.ErrUnexpectedEOF)},
		{"half, then reset", request, sockstest.Half(3, sockstest.RST), false, serverError(OpHandshake, syscall.ECONNRESET)},
		{"half, then silence", request, sockstest.Half(9, sockstest.Hold), true,
			serverError(OpHandshake, os.ErrDeadlineExceeded)},
		{"drip", request, drip, true, serverError(OpHandshake, os.ErrDeadlineExceeded)},
		{"greeting: silence", greeting, sockstest.Silence(), true, serverError(OpHandshake, os.ErrDeadlineExceeded)},
		{"greeting: close", greeting, sockstest.EarlyClose(), false, serverError(OpHandshake, io.ErrUnexpectedEOF)},
		{"greeting: reset", greeting, sockstest.EarlyReset(), false, serverError(OpHandshake, syscall.ECONNRESET)},
		{"greeting: garbage", greeting, sockstest.Garbage(), false, serverError(OpHandshake, ErrMalformed)},
		{"greeting: half", greeting, sockstest.Half(1, sockstest.Hold), true, serverError(OpHandshake, os.ErrDeadlineExceeded)},
		{"greeting: no method", greeting, sockstest.Fault{Raw: []byte{5, 0xff}}, false, serverError(OpAuthenticate, ErrMethod)},
		{
			"greeting: reply before the request",
			greeting,
			sockstest.Fault{Raw: []byte("\x05\x00\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"), End: sockstest.Hold},
			false,
			replyIs(ReplyRefused),
		},
	}
}

func TestFaults(t *testing.T) {
	_, c, srv := setup(t, Options{}, sockstest.WithRedirectsOnly())
	hasty := newDialer(t, Options{HandshakeTimeout: hastyHandshake}).Client(c.Server())
	dst := netip.MustParseAddrPort("203.0.113.1:80")
	srv.Redirect(dst, echo(t))
	for _, tt := range faultCases() {
		t.Run(tt.name, func(t *testing.T) {
			srv.SetFaultAt(tt.stage, func(sockstest.Request) sockstest.Fault { return tt.fault })
			defer srv.SetFaultAt(tt.stage, nil)
			client := c
			if tt.late {
				client = hasty
			}
			began := time.Now()
			fd, err := connect(t, client, context.Background(), AddrFrom(dst))
			took := time.Since(began)
			for try := 1; tt.late && !tt.want(err) && try < 20; try++ { // time may have run out before the fault
				began = time.Now()
				fd, err = connect(t, client, context.Background(), AddrFrom(dst))
				took = time.Since(began)
			}
			if fd != -1 || !tt.want(err) {
				t.Errorf("fd %d, %v", fd, err)
			}
			if tt.late && took < hastyHandshake || took > DefaultHandshakeTimeout/2 {
				t.Errorf("took %v", took)
			}
		})
	}
	lateGreeting(t, srv, hasty, dst)
	srv.SetFaultAt(sockstest.AtGreeting, nil)
	srv.SetFault(nil)
	fd, err := connect(t, c, context.Background(), AddrFrom(dst))
	if err != nil {
		t.Fatalf("after the faults: %v", err)
	}
	unix.Close(fd)
}

func lateGreeting(t *testing.T, srv *sockstest.Server, hasty *Client, dst netip.AddrPort) {
	t.Helper()
	// One deadline for both answers: time that the greeting took is not given again. A machine that stalls just then can
	// spoil a try, but not all of them.
	srv.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault {
		return sockstest.Fault{Delay: hastyHandshake * 3 / 4}
	})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	for try := 1; ; try++ {
		began := time.Now()
		_, err := connect(t, hasty, context.Background(), AddrFrom(dst))
		took := time.Since(began)
		if errors.Is(err, ErrSilent) && took < hastyHandshake*3/2 {
			break
		}
		if try == 20 {
			t.Fatalf("late greeting, then silence: %v after %v", err, took)
		}
	}
}

// A general failure that comes late means a silent target, and an early one does not.
func TestLateFailure(t *testing.T) {
	if testing.Short() {
		t.Skip("the proxy takes three seconds to refuse")
	}
	_, c, srv := setup(t, Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault {
		return sockstest.Fault{Reply: 1, Delay: 3200 * time.Millisecond}
	})
	_, err := connect(t, c, context.Background(), testDst)
	if !errors.Is(err, ErrLate) || !errors.Is(err, ReplyGeneralFailure) {
		t.Errorf("%v", err)
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault {
		return sockstest.Fault{Reply: 1, Delay: 200 * time.Millisecond}
	})
	if _, err := connect(t, c, context.Background(), testDst); errors.Is(err, ErrLate) || !errors.Is(err, ReplyGeneralFailure) {
		t.Errorf("%v", err)
	}
}

func TestCredentialsRefused(t *testing.T) {
	d, c, _ := setup(t, Options{}, sockstest.WithAuth("alice", "secret"))
	s, err := c.Server().WithCredentials("alice", "hunter2")
	if err != nil {
		t.Fatal(err)
	}
	_, err = connect(t, d.Client(s), context.Background(), testDst)
	var se *ServerError
	if !errors.As(err, &se) || se.Op != OpAuthenticate || !errors.Is(err, ErrCredentials) {
		t.Errorf("wrong password: %v", err)
	}
	if strings.Contains(err.Error(), "alice") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("credentials in %v", err)
	}
	_, err = connect(t, c, context.Background(), testDst)
	if !errors.As(err, &se) || se.Op != OpAuthenticate || !errors.Is(err, ErrMethod) {
		t.Errorf("no password: %v", err)
	}
}

func TestNoServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := ln.Addr().String()
	ln.Close()
	d := newDialer(t, Options{})
	_, err = connect(t, d.Client(mustServer(t, "socks5://"+at)), context.Background(), testDst)
	var se *ServerError
	if !errors.As(err, &se) || se.Op != OpConnect || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatal(err)
	}
	if want := "cannot connect to socks5://" + at + ": connection refused"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
}

func TestControlFails(t *testing.T) {
	_, c, srv := setup(t, Options{PrepareSocket: func(int) error { return syscall.EPERM }})
	_, err := connect(t, c, context.Background(), testDst)
	var se *ServerError
	if !errors.Is(err, syscall.EPERM) || errors.As(err, &se) {
		t.Errorf("%v", err)
	}
	if _, err := associate(t, c, context.Background()); !errors.Is(err, syscall.EPERM) {
		t.Errorf("%v", err)
	}
	if n := srv.Stats().Accepted; n != 0 {
		t.Errorf("%d connections without the mark", n)
	}
}

func TestDialDirect(t *testing.T) {
	var direct atomic.Int32
	d := newDialer(t, Options{
		PrepareSocket: func(int) error { return errors.New("the mark of the proxy") },
		PrepareDirect: func(int) error { direct.Add(1); return nil },
	})
	at := echo(t)
	ch := make(chan dialed, 1)
	done := func(s loop.Socket, err error) { ch <- dialed{s.Release(), err} }
	d.DialDirect(context.Background(), on(d), at, done)
	r := <-ch
	if r.err != nil || direct.Load() != 1 {
		t.Fatal(r.err, direct.Load())
	}
	b := make([]byte, 6)
	if _, err := io.ReadFull(conn(t, r.fd), b); err != nil || string(b) != "hello " {
		t.Fatalf("%q, %v", b, err)
	}
	ln, _ := net.Listen("tcp", "127.0.0.1:0")
	closed := ln.Addr().(*net.TCPAddr).AddrPort()
	ln.Close()
	d.DialDirect(context.Background(), on(d), closed, done)
	if r := <-ch; !errors.Is(r.err, syscall.ECONNREFUSED) {
		t.Error(r.err)
	}
	d.DialDirect(context.Background(), on(d), netip.AddrPortFrom(netip.IPv4Unspecified(), 0), done)
	if r := <-ch; r.err == nil {
		t.Error("a destination of zeros was reached")
	}
}

// A connection gets any free local port, odd ones too. Linux gives a plain socket an even one as long as there is one, which
// it finds by a walk over all that are taken.
func TestLocalPorts(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		to := ln.Addr().(*net.TCPAddr).AddrPort()
		const tries = 64 // by chance all are even once in 2^64 runs
		d := newDialer(t, Options{})
		ch := make(chan dialed, 1)
		odd := 0
		for range tries {
			d.DialDirect(context.Background(), on(d), to, func(s loop.Socket, err error) { ch <- dialed{s.Release(), err} })
			r := <-ch
			if r.err != nil {
				t.Fatal(r.err)
			}
			c := conn(t, r.fd)
			odd += c.LocalAddr().(*net.TCPAddr).Port & 1
			c.Close()
		}
		if odd > 0 {
			continue
		}
		// Since Linux 6.8 the option has this effect.
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			t.Fatal(err)
		}
		var major, minor int
		if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
			t.Fatal(err)
		}
		if major < 6 || major == 6 && minor < 8 {
			t.Skipf("Linux %d.%d gives even ports first, whatever is asked", major, minor)
		}
		t.Errorf("all of %d local ports toward %v are even", tries, to)
	}
}

// TestFewSegments: the ACK of the server's SYN-ACK travels with the greeting, so a handshake of two round trips takes three
// segments: SYN, greeting, request. When this machine stalls, the kernel sends an ACK by itself.
func TestFewSegments(t *testing.T) {
	_, c, _ := setup(t, Options{})
	at := echo(t)
	fewest := uint32(1000)
	for range 20 {
		fd, err := connect(t, c, context.Background(), AddrFrom(at))
		if err != nil {
			t.Fatal(err)
		}
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		unix.Close(fd)
		if err != nil {
			t.Fatal(err)
		}
		fewest = min(fewest, info.Segs_out)
	}
	if fewest > 3 {
		t.Errorf("a handshake took %d segments or more", fewest)
	}
}
