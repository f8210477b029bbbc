package socks

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

type bindResult struct {
	fd   int
	peer netip.AddrPort
	err  error
}

// bind starts a BIND and gives where the server listens, or the error.
func bind(t *testing.T, c *Client, ctx context.Context, dst Addr) (netip.AddrPort, chan bindResult) {
	t.Helper()
	at, done := make(chan netip.AddrPort, 2), make(chan bindResult, 2)
	c.Bind(
		ctx,
		on(c.d),
		dst,
		func(a netip.AddrPort) { at <- a },
		func(fd int, peer netip.AddrPort, err error) { done <- bindResult{fd, peer, err} },
	)
	select {
	case a := <-at:
		return a, done
	case r := <-done:
		done <- r
		return netip.AddrPort{}, done
	case <-time.After(testkit.Patience):
		t.Fatal("neither bound nor done")
		return netip.AddrPort{}, nil
	}
}

func (r bindResult) is(target error) bool { return r.fd == -1 && errors.Is(r.err, target) }

func wait(t *testing.T, done chan bindResult) bindResult {
	t.Helper()
	select {
	case r := <-done:
		return r
	case <-time.After(testkit.Patience):
		t.Fatal("done is not called")
		return bindResult{}
	}
}

func TestBind(t *testing.T) {
	loopback := Addr{IP: netip.MustParseAddr("127.0.0.1"), Port: 20}
	for _, scheme := range []string{"socks5", "socks4", "socks4a"} {
		d, _, srv := setup(t, Options{})
		c := d.Client(mustServer(t, scheme+"://"+srv.Addr().String()))
		for _, f := range []sockstest.Fault{{}, {Bound: &Addr0}, {Drip: time.Millisecond}} {
			f := f
			srv.SetFault(func(sockstest.Request) sockstest.Fault { return f })
			at, done := bind(t, c, context.Background(), loopback)
			if f.Bound != nil {
				if want := netip.MustParseAddrPort("127.0.0.1:7"); at != want { // 0.0.0.0 stands for the server
					t.Errorf("%s: bound %v, want %v", scheme, at, want)
				}
				continue // nobody listens there; the Dialer's end ends it
			}
			peer, err := net.Dial("tcp", at.String())
			if err != nil {
				t.Fatalf("%s: %v", scheme, err)
			}
			peer.Write([]byte("hello"))
			r := wait(t, done)
			if r.err != nil || r.peer != peer.LocalAddr().(*net.TCPAddr).AddrPort() {
				t.Fatalf("%s: %+v", scheme, r)
			}
			k := conn(t, r.fd)
			k.SetDeadline(time.Now().Add(testkit.Patience))
			buf := make([]byte, 16)
			if n, err := k.Read(buf); string(buf[:n]) != "hello" {
				t.Errorf("%s: %q, %v", scheme, buf[:n], err)
			}
			k.Close()
			peer.Close()
		}
	}
}

// Addr0 is a BND.ADDR that stands for the server.
var Addr0 = sockstest.Addr{IP: netip.IPv4Unspecified(), Port: 7}

func TestBindEnds(t *testing.T) {
	d, c, srv := setup(t, Options{})
	ctx, cancel := context.WithCancel(context.Background())
	at, done := bind(t, c, ctx, Addr{IP: netip.MustParseAddr("127.0.0.1")})
	cancel()
	if r := wait(t, done); !r.is(context.Canceled) {
		t.Errorf("cancelled: %+v", r)
	}
	testkit.Eventually(t, "the server to see it, and listen no more", func() bool {
		k, err := net.Dial("tcp", at.String())
		if err == nil {
			k.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	})
	at, done = bind(t, c, context.Background(), Addr{IP: netip.MustParseAddr("192.0.2.1")})
	if k, err := net.Dial("tcp", at.String()); err == nil {
		k.Close()
	}
	if r := wait(t, done); !r.is(ReplyNotAllowed) {
		t.Errorf("another peer: %+v", r)
	}
	_, done = bind(t, c, context.Background(), Addr{IP: netip.MustParseAddr("127.0.0.1")})
	srv.CutAll(sockstest.FIN)
	if r := wait(t, done); !r.is(ErrEnded) {
		t.Errorf("the server ended it: %+v", r)
	}
	d.bindTimeout = 50 * time.Millisecond
	_, done = bind(t, c, context.Background(), Addr{IP: netip.MustParseAddr("127.0.0.1")})
	if r := wait(t, done); !r.is(ErrNoPeer) {
		t.Errorf("nobody came: %+v", r)
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(7) })
	if _, done := bind(t, c, context.Background(), testDst); !wait(t, done).is(ReplyCommandNotSupported) {
		t.Error("refused BIND")
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault {
		return sockstest.Bound(sockstest.Addr{IP: netip.MustParseAddr("127.0.0.1")})
	})
	if _, done := bind(t, c, context.Background(), testDst); !wait(t, done).is(ErrMalformed) {
		t.Error("bound to port 0")
	}
}
