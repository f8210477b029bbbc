package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

func listen(t *testing.T, opts ...sockstest.Option) *sockstest.Server {
	t.Helper()
	s, err := sockstest.Listen("tcp4", "127.0.0.1:0", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestProbe(t *testing.T) {
	open, login := listen(t), listen(t, sockstest.WithAuth("al", "geheim"))
	at := func(stage sockstest.Stage, f sockstest.Fault, opts ...sockstest.Option) string {
		s := listen(t, opts...)
		s.SetFaultAt(stage, func(sockstest.Request) sockstest.Fault { return f })
		return s.Addr().String()
	}
	auth := sockstest.WithAuth("al", "geheim")
	for _, tt := range []struct{ url, want string }{
		{open.Addr().String(), ""},
		{"al:x@" + open.Addr().String(), ""}, // it wants no login: none is made
		{"al:geheim@" + login.Addr().String(), ""},
		{at(sockstest.AtGreeting, sockstest.Drip(20*time.Millisecond)), ""},
		{login.Addr().String(), "it wants a login: use --proxy socks5://USER@"},
		{"al:x@" + login.Addr().String(), "it refused the user or the password"},
		{at(sockstest.AtGreeting, sockstest.Garbage()), "what answers there does not speak SOCKS5"},
		{at(sockstest.AtGreeting, sockstest.BadVersion()), "what answers there does not speak SOCKS5"},
		{at(sockstest.AtGreeting, sockstest.EarlyClose()), "it closed the connection"},
		{at(sockstest.AtGreeting, sockstest.EarlyReset()), "it closed the connection"},
		{at(sockstest.AtGreeting, sockstest.Silence()), "it does not answer"},
		{"al:geheim@" + at(sockstest.AtAuth, sockstest.Silence(), auth), "it does not answer"},
		{"al:geheim@" + at(sockstest.AtAuth, sockstest.EarlyClose(), auth), "it closed the connection"},
	} {
		ask := func(limit time.Duration) error {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			return probe(ctx, parse(t, "--proxy", "socks5://"+tt.url), dialing{})
		}
		var err error
		if tt.want == "it does not answer" {
			for range 20 { // time may have run out before it was asked
				if err = ask(300 * time.Millisecond); err == nil || strings.Contains(err.Error(), tt.want) {
					break
				}
			}
		} else {
			err = ask(testkit.Patience)
		}
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.url, err, tt.want)
		}
		if err != nil && (strings.Contains(err.Error(), "geheim") || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: shows the password, or has lines: %v", tt.url, err)
		}
	}
	if n := len(open.Requests()) + len(login.Requests()); n != 0 {
		t.Errorf("the proxies were asked for something: %d requests", n)
	}
	// All are looked at; the first that fails is told.
	err := probe(context.Background(), parse(t, "--proxy", open.URL(), "--upstream", "b="+login.URL()), dialing{})
	if err == nil || !strings.Contains(err.Error(), login.Addr().String()) {
		t.Error(err)
	}
}

func TestProbeStopped(t *testing.T) {
	s := listen(t)
	s.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	ctx, cancel := context.WithCancelCause(context.Background())
	time.AfterFunc(50*time.Millisecond, func() { cancel(errors.New("stopped by a signal: test")) })
	if err := probe(ctx, parse(t, "--proxy", s.URL()), dialing{}); err == nil || err.Error() != "stopped by a signal: test" {
		t.Error(err)
	}
}

func TestProbeUsesDialing(t *testing.T) {
	s := listen(t)
	marked, asked := 0, ""
	d := dialing{
		prepare: func(int) error { marked++; return nil },
		resolve: func(_ context.Context, host string) ([]netip.Addr, error) {
			asked = host
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
		},
	}
	if err := probe(context.Background(), parse(t, "--proxy", fmt.Sprintf("socks5://proxy.test:%d", s.Addr().Port())),
		d); err != nil {
		t.Error(err)
	}
	if marked != 1 || asked != "proxy.test" {
		t.Errorf("%d sockets marked, %q asked", marked, asked)
	}
	d.prepare = func(int) error { return syscall.EPERM }
	if err := probe(context.Background(), parse(t, "--proxy", s.URL()), dialing{prepare: d.prepare}); err == nil ||
		!strings.Contains(err.Error(), "operation not permitted") {
		t.Error(err)
	}
}

func TestExplain(t *testing.T) {
	s, err := socks.ParseServer("socks5://al:geheim@proxy.test:1")
	if err != nil {
		t.Fatal(err)
	}
	fault := func(op string, err error) error { return &socks.ServerError{Server: s.String(), Op: op, Err: err} }
	for _, tt := range []struct {
		err  error
		want string
	}{
		{fault(socks.OpResolve, &net.DNSError{Err: "no such host", Name: "proxy.test"}),
			"cannot find the proxy proxy.test:1: no such host: is the name right?"},
		{fault(socks.OpResolve, errors.New("no address")), "cannot find the proxy proxy.test:1: no address"},
		{fault(socks.OpConnect, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}),
			"cannot reach the proxy proxy.test:1: connection refused: is it running, and is this its port?"},
		{fault(socks.OpConnect, syscall.EHOSTUNREACH), "cannot reach the proxy proxy.test:1: no route to host"},
		{fault(socks.OpConnect, context.DeadlineExceeded),
			"cannot reach the proxy proxy.test:1: no answer: is the address right?"},
		{fault(socks.OpConnect, syscall.ETIMEDOUT), "cannot reach the proxy proxy.test:1: no answer: is the address right?"},
		{fault(socks.OpAuthenticate, socks.ErrMethod),
			"cannot log in to the proxy proxy.test:1: it accepts neither a password nor an anonymous login"},
		{fault(socks.OpHandshake, io.ErrUnexpectedEOF),
			"cannot use the proxy proxy.test:1: it closed the connection: does it speak SOCKS5, and does it accept this host?"},
		{fault(socks.OpHandshake, errors.New("odd")), "cannot use the proxy proxy.test:1: odd"},
		{errors.New("other"), "other"},
	} {
		if got := explain(s, tt.err); got.Error() != tt.want {
			t.Errorf("%v: got %q, want %q", tt.err, got, tt.want)
		}
	}
}

// A proxy that resets what it does not understand may have no TLS.
func TestProbeTLSReset(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 1))
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	}()
	where := l.Addr().String()
	err = probe(context.Background(), parse(t, "--proxy", "socks5+tls://"+where), dialing{})
	want := "cannot use the proxy " + where + ": it has ended the connection: does it speak TLS?"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %q", err, want)
	}
}

// A proxy inside TLS is looked at inside TLS, and what is wrong with its certificate is said.
func TestProbeTLS(t *testing.T) {
	cert, pem, err := sockstest.Certificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem, 0o600); err != nil {
		t.Fatal(err)
	}
	inside := sockstest.WithTLS(&tls.Config{Certificates: []tls.Certificate{cert}})
	open, login, plain := listen(t, inside), listen(t, inside, sockstest.WithAuth("al", "geheim")), listen(t)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--proxy", "socks5+tls://" + open.Addr().String(), "--proxy-ca", ca}, ""},
		{[]string{"--proxy", "https://" + open.Addr().String(), "--proxy-ca", ca}, ""},
		{[]string{"--proxy", "socks5+tls://" + open.Addr().String()}, "give the authority's certificate with --proxy-ca FILE"},
		{[]string{"--proxy", "socks5+tls://" + login.Addr().String(), "--proxy-ca", ca}, "with --password-file FILE"},
		{[]string{"--proxy", "socks5+tls://" + plain.Addr().String(), "--proxy-ca", ca}, "does it speak TLS?"},
	} {
		err := probe(context.Background(), parse(t, tt.args...), dialing{})
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want %q", tt.args, err, tt.want)
		}
	}
}
