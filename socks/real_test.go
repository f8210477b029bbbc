package socks

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// What real servers were seen to do with the bytes of the handshake.

// socksv5 0.0.6 and @pondwader/socks5-server 1.0.10 refuse in two bytes and close.
func TestRefusedInTwoBytes(t *testing.T) {
	_, c, srv := setup(t, Options{})
	for _, end := range []sockstest.End{sockstest.FIN, sockstest.RST, sockstest.Hold} {
		srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Fault{Raw: []byte{5, 5}, End: end} })
		if _, err := connect(t, c, context.Background(), testDst); !errors.Is(err, ReplyRefused) {
			t.Errorf("%v, want reply 5", err)
		}
	}
}

// mihomo 1.19 chooses user and password although they were not offered.
func TestLoginWantedWithoutOffer(t *testing.T) {
	_, c, srv := setup(t, Options{})
	srv.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Fault{Raw: []byte{5, 2}} })
	_, err := connect(t, c, context.Background(), testDst)
	var fault *ServerError
	if !errors.Is(err, ErrMethod) || !errors.As(err, &fault) || fault.Op != OpAuthenticate {
		t.Errorf("%v", err)
	}
}

// socksv5 and @pondwader/socks5-server hang or close on a user without a password.
func TestUserWithoutPassword(t *testing.T) {
	d, c, srv := setup(t, Options{HandshakeTimeout: 300 * time.Millisecond}, sockstest.WithAuth("alice", "secret"))
	for _, f := range []sockstest.Fault{sockstest.Silence(), sockstest.EarlyClose(), sockstest.EarlyReset()} {
		srv.SetFaultAt(sockstest.AtAuth, func(sockstest.Request) sockstest.Fault { return f })
		for pass, want := range map[string]bool{"": true, "secret": false} {
			s, err := c.Server().WithCredentials("alice", pass)
			if err != nil {
				t.Fatal(err)
			}
			_, err = connect(t, d.Client(s), context.Background(), testDst)
			var fault *ServerError
			if !errors.As(err, &fault) || fault.Op != OpAuthenticate || errors.Is(err, ErrNoPassword) != want {
				t.Errorf("%+v, password %q: %v", f, pass, err)
			}
		}
	}
}

// A dante without IPv6 refuses :: with 8, and one that is asked with 0.0.0.0 over IPv6 names an IPv4 relay.
func TestAssociateAsksByFamily(t *testing.T) {
	for _, tt := range []struct {
		listen  string
		refuses string // what is answered by 8
		asked   []string
	}{
		{"127.0.0.1:0", "", []string{"0.0.0.0:0"}},
		{"[::1]:0", "", []string{"[::]:0"}},
		{"127.0.0.1:0", "0.0.0.0:0", []string{"0.0.0.0:0", "[::]:0"}},
		{"[::1]:0", "[::]:0", []string{"[::]:0", "0.0.0.0:0"}},
		{"[::1]:0", "both", []string{"[::]:0", "0.0.0.0:0"}},
	} {
		srv, err := sockstest.Listen("tcp", tt.listen)
		if err != nil {
			t.Fatal(err)
		}
		srv.SetFault(func(r sockstest.Request) sockstest.Fault {
			if tt.refuses == "both" || r.Dst.String() == tt.refuses {
				return sockstest.Reply(8)
			}
			return sockstest.Fault{}
		})
		d := newDialer(t, Options{})
		a, err := associate(t, d.Client(mustServer(t, srv.URL())), context.Background())
		if (err != nil) != (tt.refuses == "both") || err != nil && !errors.Is(err, ReplyAddrTypeNotSupported) {
			t.Errorf("%+v: %v", tt, err)
		}
		if a != nil {
			a.Close()
		}
		var asked []string
		for _, r := range srv.Requests() {
			asked = append(asked, r.Dst.String())
		}
		if len(asked) != len(tt.asked) || asked[0] != tt.asked[0] || asked[len(asked)-1] != tt.asked[len(asked)-1] {
			t.Errorf("%+v: asked for %q", tt, asked)
		}
		srv.Close()
	}
}

// A server on a unix socket is a server like others; PrepareSocket sees none of its sockets.
func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for _, at := range []string{path, "@viasocks-test-" + filepath.Base(t.TempDir())} {
		srv, err := sockstest.Listen("unix", at)
		if err != nil {
			t.Fatal(err)
		}
		far, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if c, err := far.Accept(); err == nil {
				c.Write([]byte("hello"))
				c.Close()
			}
		}()
		d := newDialer(t, Options{PrepareSocket: func(fd int) error {
			if f, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); f == unix.AF_UNIX {
				return os.ErrInvalid
			}
			return nil
		}})
		c := d.Client(mustServer(t, "socks5+unix://"+at))
		fd, err := connect(t, c, context.Background(), AddrFrom(far.Addr().(*net.TCPAddr).AddrPort()))
		if err != nil {
			t.Fatalf("%s: %v", at, err)
		}
		k := conn(t, fd)
		buf := make([]byte, 16)
		if n, err := k.Read(buf); err != nil || string(buf[:n]) != "hello" {
			t.Errorf("%q, %v", buf[:n], err)
		}
		a, err := associate(t, c, context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if a.Relay().Addr() != netip.MustParseAddr("127.0.0.1") {
			t.Errorf("relay %v", a.Relay())
		}
		a.Close()
		k.Close()
		far.Close()
		srv.Close()
	}
	d := newDialer(t, Options{})
	var fault *ServerError
	_, err := connect(t, d.Client(mustServer(t, "socks5+unix:///nonexistent/s")), context.Background(), testDst)
	if !errors.As(err, &fault) || fault.Op != OpConnect || !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v", err)
	}
}

// A full queue is waited for, within the connect timeout.
func TestUnixSocketBusy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	if err := unix.Bind(l, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(l, 0); err != nil { // room for one
		t.Fatal(err)
	}
	d := newDialer(t, Options{ConnectTimeout: 300 * time.Millisecond, HandshakeTimeout: testkit.Patience})
	c := d.Client(mustServer(t, "socks5+unix://"+path))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	results := make(chan error, 2)
	c.Connect(ctx, on(d), testDst, func(_ loop.Socket, err error) { results <- err })
	testkit.Eventually(t, "the first dial to be pending", func() bool { return d.Stats().Pending == 1 })
	var fault *ServerError
	if _, err := connect(t, c, context.Background(), testDst); !errors.As(err, &fault) || fault.Op != OpConnect ||
		!errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%v, want a timeout", err)
	}
	d.SetTimeouts(testkit.Patience, testkit.Patience)
	c.Connect(ctx, on(d), testDst, func(_ loop.Socket, err error) { results <- err })
	testkit.Pace(3 * busyWait)
	for range 2 { // the second is there once the first is taken
		fd, _, err := unix.Accept(l)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	for range 2 {
		select {
		case err := <-results:
			if !errors.As(err, &fault) || fault.Op != OpHandshake {
				t.Errorf("%v, want an end in the handshake", err)
			}
		case <-time.After(testkit.Patience):
			t.Fatal("the dial does not go on")
		}
	}
}
