package socks

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// uotAssociate asks c for UDP over TCP. The stream that it gives is not watched any more.
func uotAssociate(t *testing.T, c *Client) (a *Association, fd int, err error) {
	t.Helper()
	type answer struct {
		a   *Association
		fd  int
		err error
	}
	ch := make(chan answer, 1)
	c.Associate(context.Background(), on(c.d), func(a *Association, err error) {
		fd := -1
		if a != nil && a.OverTCP() {
			fd = a.Stream().Release()
			if s := a.Stream(); s != loop.NoSocket {
				t.Error("the stream is given twice")
			}
		}
		ch <- answer{a, fd, err}
	})
	r := <-ch
	return r.a, r.fd, r.err
}

// TestUDPOverTCP: a CONNECT to the name, port 0, then the request, with each protocol that carries names; in TLS too.
func TestUDPOverTCP(t *testing.T) {
	cert, pem, err := sockstest.Certificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	for _, scheme := range []string{"socks5", "socks4a", "http", "socks5+tls", "https"} {
		d, _, srv := setup(t, Options{}, sockstest.WithUDPOverTCP())
		if scheme == "socks5+tls" || scheme == "https" {
			d, _, srv = setup(
				t,
				Options{},
				sockstest.WithUDPOverTCP(),
				sockstest.WithTLS(&tls.Config{Certificates: []tls.Certificate{cert}}),
			)
		}
		s, err := mustServer(t, scheme+"://"+srv.Addr().String()+"?udp=over-tcp").WithCA(pem)
		if err != nil {
			t.Fatal(err)
		}
		a, fd, err := uotAssociate(t, d.Client(s))
		if err != nil {
			t.Errorf("%s: %v", scheme, err)
			continue
		}
		if !a.OverTCP() || a.Relay().IsValid() || fd < 0 {
			t.Fatalf("%s: %+v, descriptor %d", scheme, a, fd)
		}
		k := conn(t, fd)
		all, ok := srv.WaitAssociations(1, testkit.Patience) // it has taken the request
		if !ok {
			t.Fatalf("%s: the request was not taken: %+v", scheme, srv.Stats())
		}
		if dst := all[0].Request().Dst; dst.Name != "sp.v2.udp-over-tcp.arpa" || dst.Port != 0 {
			t.Errorf("%s: asked for %v", scheme, dst)
		}
		src := netip.MustParseAddrPort("[2001:db8::7]:53")
		if err := all[0].Send(sockstest.AddrFrom(src), []byte("hello")); err != nil {
			t.Fatal(err)
		}
		want := append(UoTCodec{}.AppendHeader(nil, src, 5), "hello"...)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(k, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: % x, %v; want % x", scheme, got, err, want)
		}
		told := make(chan error, 1)
		a.OnClose(func(err error) { told <- err })
		a.fail(&ServerError{Server: "x", Op: OpAssociation, Err: errServerDown})
		if err := <-told; !errors.Is(err, errServerDown) {
			t.Errorf("%s: told %v", scheme, err)
		}
		a.Close()
		k.Close()
		testkit.Eventually(t, "all to be given back", func() bool {
			return d.Stats() == Stats{} && srv.Stats().AssociationsOpen == 0
		})
	}
}

// TestUDPOverTCPUntaken: an association whose stream nobody took closes it.
func TestUDPOverTCPUntaken(t *testing.T) {
	d, _, srv := setup(t, Options{}, sockstest.WithUDPOverTCP())
	a, err := associate(t, d.Client(mustServer(t, srv.URL()+"?udp=over-tcp")), context.Background())
	if err != nil {
		t.Fatal(err)
	}
	srv.WaitAssociations(1, testkit.Patience)
	a.Close()
	testkit.Eventually(t, "all to be given back", func() bool {
		return srv.Stats().AssociationsOpen == 0 && d.Stats() == Stats{}
	})
}

// TestUDPOverTCPRefused: whatever a server answers about the name is its word on UDP, and what is its fault stays one.
func TestUDPOverTCPRefused(t *testing.T) {
	d, plain, srv := setup(t, Options{}, sockstest.WithRedirectsOnly())
	c := d.Client(mustServer(t, srv.URL()+"?udp=over-tcp"))
	for _, f := range []sockstest.Fault{{}, sockstest.Reply(1), sockstest.Reply(5), sockstest.Reply(7),
		sockstest.EarlyClose()} {
		srv.SetFault(func(sockstest.Request) sockstest.Fault { return f })
		var fault *ServerError
		if _, _, err := uotAssociate(t, c); !errors.Is(err, ReplyCommandNotSupported) || errors.As(err, &fault) {
			t.Errorf("%+v: %v", f, err)
		}
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Garbage() })
	var fault *ServerError
	if _, _, err := uotAssociate(t, c); !errors.As(err, &fault) || errors.Is(err, ReplyCommandNotSupported) {
		t.Errorf("garbage: %v", err)
	}
	// Without the word it is never asked for.
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(7) })
	if _, err := associate(t, plain, context.Background()); !errors.Is(err, ReplyCommandNotSupported) {
		t.Errorf("%v", err)
	}
	if all := srv.Requests(); all[len(all)-1].Cmd != sockstest.CmdAssociate {
		t.Errorf("asked %+v", all[len(all)-1])
	}
}

func TestUDPOverTCPURL(t *testing.T) {
	for _, good := range []string{"socks5://h?udp=over-tcp", "socks5h://al:x@h:1?udp=over-tcp", "socks4a://h?udp=over-tcp",
		"http://h?udp=over-tcp", "https://h?udp=over-tcp", "socks5+tls://h?udp=over-tcp", "socks5+unix:///s?udp=over-tcp"} {
		if s, err := ParseServer(good); err != nil || !s.UDPOverTCP() {
			t.Errorf("%s: %v, %v", good, s, err)
		}
	}
	for _, bad := range []string{"socks4://h?udp=over-tcp", "socks5://h?udp", "socks5://h?udp=over-udp",
		"socks5://h?udp=over-tcp&udp=over-tcp", "socks5://h?tor&udp=over-tcp"} {
		if s, err := ParseServer(bad); err == nil {
			t.Errorf("%s is taken as %v", bad, s)
		}
	}
	if s, err := ParseServer("socks5://h"); err != nil || s.UDPOverTCP() {
		t.Errorf("%v, %v", s, err)
	}
}

// TestUoTFrames: the frames of sing's common/uot, byte by byte; each prefix is too short, and nothing more.
func TestUoTFrames(t *testing.T) {
	for _, tt := range []struct {
		frame   string
		src     string // empty: a name
		payload int
	}{
		{"\x00\xc0\x00\x02\x01\x00\x35\x00\x02hi", "192.0.2.1:53", 2},
		{"\x01\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x1a\xe1\x00\x00", "[2001:db8::1]:6881", 0},
		{"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x01\x00\x35\xff\xff", "192.0.2.1:53", 65535},
		{"\x02\x09a.example\x00\x35\x00\x01x", "", 1},
	} {
		b := []byte(tt.frame)
		src, n, size, err := UoTCodec{}.ParseHeader(b)
		if err != nil || size != tt.payload || n > len(b) || src.IsValid() != (tt.src != "") ||
			src.IsValid() && src.String() != tt.src {
			t.Errorf("%q: %v, %d, %d, %v", tt.frame, src, n, size, err)
		}
		for i := range n {
			if _, n, _, err := (UoTCodec{}).ParseHeader(b[:i:i]); n != 0 || err != nil {
				t.Errorf("%q: %d, %v", b[:i], n, err)
			}
		}
		same := src.IsValid() && src.Addr().Is6() == (b[0] == uotIPv6) // a mapped address is written as IPv4
		if h := (UoTCodec{}).AppendHeader(nil, src, size); same && !bytes.Equal(h, b[:n]) {
			t.Errorf("% x came back as % x", b[:n], h)
		}
	}
	for _, bad := range []string{"\x03xx", "\x04\x00", "\xff\x01", "\x02\x00"} {
		if _, _, _, err := (UoTCodec{}).ParseHeader([]byte(bad)); !errors.Is(err, ErrUoTFrame) || !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	ap := netip.MustParseAddrPort("192.0.2.1:1")
	for _, size := range []int{-1, 65536} {
		if h := (UoTCodec{}).AppendHeader([]byte{7}, ap, size); len(h) != 1 {
			t.Errorf("%d bytes: % x", size, h)
		}
	}
	if h := (UoTCodec{}).AppendHeader(nil, netip.AddrPort{}, 1); len(h) != 0 {
		t.Errorf("no endpoint: % x", h)
	}
	room := make([]byte, 0, 64)
	if n := testing.AllocsPerRun(100, func() {
		h := UoTCodec{}.AppendHeader(room, ap, 9)
		UoTCodec{}.ParseHeader(h)
		UoTCodec{}.ParseHeader([]byte("\xff\x01"))
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzUoTFrame: no panic, lengths within bounds, a longer input is understood in the same way, and what was parsed is written
// back to the same bytes.
func FuzzUoTFrame(f *testing.F) {
	f.Add([]byte("\x00\xc0\x00\x02\x01\x00\x35\x00\x02hi"))
	f.Add([]byte("\x01aaaaaaaaaaaaaaaa\x00\x01\x00\x00"))
	f.Add([]byte("\x02\x09a.example\x00\x35\x00\x01x"))
	f.Add([]byte("\x03"))
	f.Fuzz(func(t *testing.T, b []byte) {
		src, n, size, err := UoTCodec{}.ParseHeader(b)
		if n < 0 || n > len(b) || n > 2+255+4 || size < 0 || size > 65535 || err != nil && n != 0 {
			t.Fatalf("%d and %d of %d bytes, %v", n, size, len(b), err)
		}
		if n == 0 && err == nil && len(b) >= 2+255+4 {
			t.Fatalf("%d bytes are too short", len(b))
		}
		src2, n2, size2, err2 := UoTCodec{}.ParseHeader(append(b[:len(b):len(b)], 0))
		if n != 0 && (src2 != src || n2 != n || size2 != size) || err != nil && err2 != err {
			t.Fatalf("with one byte more: %v, %d, %d, %v", src2, n2, size2, err2)
		}
		same := src.IsValid() && src.Addr().Is6() == (b[0] == uotIPv6)
		if back := (UoTCodec{}).AppendHeader(nil, src, size); same && !bytes.Equal(back, b[:n]) {
			t.Fatalf("% x came back as % x", b[:n], back)
		}
	})
}
