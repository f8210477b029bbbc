package socks

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// tlsServer is a sockstest server inside TLS, and its URL's Server that trusts it.
func tlsServer(t *testing.T, o Options, scheme string, hosts ...string) (*Dialer, *Client, *sockstest.Server) {
	t.Helper()
	cert, pem, err := sockstest.Certificate(hosts...)
	if err != nil {
		t.Fatal(err)
	}
	d, _, srv := setup(t, o, sockstest.WithTLS(&tls.Config{Certificates: []tls.Certificate{cert}}))
	s, err := mustServer(t, scheme+"://"+srv.Addr().String()).WithCA(pem)
	if err != nil {
		t.Fatal(err)
	}
	return d, d.Client(s), srv
}

// accepter gives the first connection that is made to it.
func accepter(t *testing.T) (Addr, func() *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return AddrFrom(ln.Addr().(*net.TCPAddr).AddrPort()), func() *net.TCPConn {
		ln.(*net.TCPListener).SetDeadline(time.Now().Add(testkit.Patience))
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(testkit.Patience))
		return c.(*net.TCPConn)
	}
}

// tlsPair is a connection through TLS: our end, which is a unix socket, and the far end.
func tlsPair(t *testing.T, c *Client) (near *net.UnixConn, far *net.TCPConn) {
	t.Helper()
	dst, accept := accepter(t)
	fd, err := connect(t, c, context.Background(), dst)
	if err != nil {
		t.Fatal(err)
	}
	k := conn(t, fd)
	k.SetDeadline(time.Now().Add(testkit.Patience))
	return k.(*net.UnixConn), accept()
}

func TestTLS(t *testing.T) {
	for _, scheme := range []string{"socks5+tls", "socks4a+tls", "https"} {
		t.Run(scheme, func(t *testing.T) {
			_, c, srv := tlsServer(t, Options{}, scheme, "127.0.0.1")
			srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Fault{Extra: []byte("early ")} })
			near, far := tlsPair(t, c)
			sent := make([]byte, 3<<20)
			rand.Read(sent)
			go func() {
				near.Write(sent)
				near.CloseWrite()
			}()
			got, err := io.ReadAll(far)
			if err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("up: %d bytes of %d, %v", len(got), len(sent), err)
			}
			go func() { // after the FIN of the other direction
				far.Write(sent)
				far.CloseWrite()
			}()
			got, err = io.ReadAll(near)
			if err != nil || string(got[:6]) != "early " || !bytes.Equal(got[6:], sent) {
				t.Fatalf("down: %d bytes of %d, %v", len(got), len(sent)+6, err)
			}
			near.Close()
		})
	}
}

// A reset, and a TLS connection that is cut without close_notify, is a reset for us, after what came before it; in whatever
// state the other direction is.
func TestTLSCutIsReset(t *testing.T) {
	for _, state := range []string{"", "sent", "FIN"} {
		for _, end := range []sockstest.End{sockstest.FIN, sockstest.RST} {
			_, c, srv := tlsServer(t, Options{}, "socks5+tls", "127.0.0.1")
			near, far := tlsPair(t, c)
			if state == "sent" {
				near.Write([]byte("question"))
				io.ReadFull(far, make([]byte, 8))
			} else if state == "FIN" {
				near.CloseWrite()
				io.ReadAll(far)
			}
			far.Write([]byte("answer"))
			got := make([]byte, 6)
			if _, err := io.ReadFull(near, got); err != nil || string(got) != "answer" {
				t.Fatalf("%q, %v", got, err)
			}
			srv.CutAll(end)
			if n, err := near.Read(got); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%q, end %d: %d bytes, %v, want a reset", state, end, n, err)
			}
			near.Close()
		}
	}
}

// The server ends first, in order; then we do.
func TestTLSEndsInOrder(t *testing.T) {
	_, c, _ := tlsServer(t, Options{}, "socks5+tls", "127.0.0.1")
	near, far := tlsPair(t, c)
	far.CloseWrite()
	if b, err := io.ReadAll(near); err != nil || len(b) != 0 {
		t.Fatalf("%q, %v", b, err)
	}
	near.Write([]byte("late"))
	near.Close()
	if b, err := io.ReadAll(far); err != nil || string(b) != "late" {
		t.Errorf("%q, %v", b, err)
	}
}

// Who closes our end before the server's FIN has reset; the server sees TLS end without close_notify.
func TestTLSResetByUs(t *testing.T) {
	for _, fin := range []bool{false, true} {
		cert, pem, err := sockstest.Certificate("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			k, err := ln.Accept()
			if err != nil {
				ended <- err
				return
			}
			defer k.Close()
			io.ReadFull(k, make([]byte, 9))
			k.Write([]byte{0, 0x5a, 0, 0, 0, 0, 0, 0})
			if fin {
				_, err = io.ReadAll(k) // close_notify
				if err != nil {
					ended <- err
					return
				}
				_, err = k.(*tls.Conn).NetConn().Read(make([]byte, 1)) // though the server sends nothing more
			} else {
				_, err = k.Read(make([]byte, 1))
			}
			ended <- err
		}()
		d := newDialer(t, Options{})
		s, err := mustServer(t, "socks4+tls://"+ln.Addr().String()).WithCA(pem)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := connect(t, d.Client(s), context.Background(), testDst)
		if err != nil {
			t.Fatal(err)
		}
		k := conn(t, fd).(*net.UnixConn)
		if fin {
			k.CloseWrite()
			testkit.Settle(50*time.Millisecond, "close_notify leaves before the close")
		}
		k.Close()
		select {
		case err := <-ended:
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("fin %v: %v, want a reset", fin, err)
			}
		case <-time.After(testkit.Patience):
			t.Errorf("fin %v: the server sees no end", fin)
		}
		ln.Close()
	}
}

func TestTLSRefused(t *testing.T) {
	_, c, _ := tlsServer(t, Options{}, "socks5+tls", "192.0.2.1")
	var fault *ServerError
	if _, err := connect(t, c, context.Background(), testDst); !errors.As(err, &fault) || fault.Op != OpSecure ||
		!errors.As(err, &x509.HostnameError{}) {
		t.Errorf("another host's certificate: %v", err)
	}
	d, c, _ := tlsServer(t, Options{}, "socks5+tls", "127.0.0.1")
	s := c.Server()
	s.ca = ""
	if _, err := connect(t, d.Client(s), context.Background(), testDst); !errors.As(err, &fault) || fault.Op != OpSecure ||
		!strings.Contains(err.Error(), "authority") {
		t.Errorf("an unknown authority: %v", err)
	}
	if _, err := associate(t, c, context.Background()); !errors.Is(err, ErrCannotExpress) ||
		!errors.Is(err, ReplyCommandNotSupported) {
		t.Errorf("UDP: %v", err)
	}
	if _, err := s.WithCA([]byte("hunter2")); err == nil {
		t.Error("no certificate is taken")
	}
}

// A server that says nothing, or no TLS, is at fault within the handshake timeout, whatever is spoken inside; a cancelled dial
// leaves nothing.
func TestTLSHangs(t *testing.T) {
	d, _, _ := setup(t, Options{HandshakeTimeout: 200 * time.Millisecond})
	ln, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, scheme := range []string{"socks5+tls", "socks4+tls", "https"} {
		c := d.Client(mustServer(t, scheme+"://"+ln.Addr().String()))
		var fault *ServerError
		_, err := connect(t, c, context.Background(), testDst)
		if !errors.As(err, &fault) || fault.Op != OpSecure ||
			!errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", scheme, err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if _, err := connect(t, c, ctx, testDst); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s, cancelled: %v", scheme, err)
		}
		cancel()
	}
	plain, err := sockstest.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	var fault *ServerError
	_, err = connect(t, d.Client(mustServer(t, "https://"+plain.Addr().String())), context.Background(), testDst)
	if !errors.As(err, &fault) || fault.Op != OpSecure {
		t.Errorf("a server without TLS: %v", err)
	}
}
