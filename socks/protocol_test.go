package socks

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// greeter listens and says hello, then ends.
func greeter(t *testing.T) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// Each protocol carries bytes, keeps those that come together with the reply, however they are cut, and tells refusals.
func TestProtocols(t *testing.T) {
	for _, scheme := range []string{"socks5", "socks4", "socks4a", "http"} {
		t.Run(scheme, func(t *testing.T) { checkProtocol(t, scheme) })
	}
}

func checkProtocol(t *testing.T, scheme string) {
	pass := "s:cret"
	if strings.HasPrefix(scheme, "socks4") {
		pass = ""
	}
	d, _, srv := setup(t, Options{}, sockstest.WithAuth("alice", pass))
	far := greeter(t)
	dst := AddrFrom(far)
	if scheme == "socks4a" || scheme == "http" {
		dst = Addr{Name: "localhost", Port: far.Port()}
	}
	s := mustServer(t, scheme+"://"+srv.Addr().String())
	user := func(user string) *Client {
		s, err := s.WithCredentials(user, pass)
		if err != nil {
			t.Fatal(err)
		}
		return d.Client(s)
	}
	for _, f := range []sockstest.Fault{{Extra: []byte("early ")}, {Extra: []byte("early "), Drip: time.Millisecond}} {
		srv.SetFault(func(sockstest.Request) sockstest.Fault { return f })
		fd, err := connect(t, user("alice"), context.Background(), dst)
		if err != nil {
			t.Fatal(err)
		}
		c := conn(t, fd)
		c.SetDeadline(time.Now().Add(testkit.Patience))
		if b, err := io.ReadAll(c); string(b) != "early hello" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		c.Close()
	}
	var fault *ServerError
	if _, err := connect(t, user("bob"), context.Background(), dst); !errors.As(err, &fault) ||
		!errors.Is(err, ErrCredentials) ||
		fault.Op != OpAuthenticate {
		t.Errorf("another user: %v", err)
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(2) })
	want := map[string]Reply{"socks5": ReplyNotAllowed, "http": ReplyNotAllowed}[scheme]
	if want == 0 {
		want = ReplyGeneralFailure
	}
	if _, err := connect(t, user("alice"), context.Background(), dst); !errors.Is(err, want) {
		t.Errorf("refused: %v", err)
	}
	if scheme == "socks5" {
		return
	}
	if _, err := associate(t, user("alice"), context.Background()); !errors.Is(err, ErrCannotExpress) ||
		!errors.Is(err, ReplyCommandNotSupported) {
		t.Errorf("UDP: %v", err)
	}
}
