package publish

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// here makes sockets in the test's own namespace.
type here struct{}

func (here) Socket(domain, typ int) (int, error) {
	return unix.Socket(domain, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
}

var (
	lo4 = netip.MustParseAddr("127.0.0.1")
	lo6 = netip.MustParseAddr("::1")
	// The program is at 127.0.0.3 or ::1, and sees 127.0.0.9 as the source.
	targets = []Target{{To: netip.MustParseAddr("127.0.0.3"), From: netip.MustParseAddr("127.0.0.9")}, {To: lo6, From: lo6}}
)

func start(t *testing.T, specs ...Spec) *Publisher {
	t.Helper()
	p, err := Start(Config{
		Specs: specs, Sockets: here{}, Targets: targets, Datagrams: targets, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// serve runs f for each connection to the program, at the address at.
func serve(t *testing.T, at string, f func(*net.TCPConn)) (port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(at, "0"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(testkit.Patience))
				f(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func dial(t *testing.T, s Spec) stream {
	t.Helper()
	var c net.Conn
	var err error
	if s.Path != "" {
		c, err = net.Dial("unix", s.Path)
	} else {
		c, err = net.Dial("tcp", s.Listen.String())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(testkit.Patience)); err != nil {
		t.Fatal(err)
	}
	return c.(stream)
}

func anyPort(port uint16) Spec { return Spec{Listen: netip.AddrPortFrom(lo4, 0), Port: port} }

// What comes in both directions is whole, also when each side ends its own by itself, at IPv4, at IPv6 and by a unix socket.
func TestHalfClose(t *testing.T) {
	testkit.CheckLeaks(t)
	const size = 3 << 20
	for _, at := range []string{"127.0.0.3", "::1"} {
		from := make(chan string, 2)
		port := serve(t, at, func(c *net.TCPConn) {
			from <- c.RemoteAddr().(*net.TCPAddr).IP.String()
			n, err := io.Copy(io.Discard, c) // to the end of what comes, and only then something goes back
			if n != size || err != nil {
				t.Errorf("the program got %d bytes, %v", n, err)
			}
			c.Write(bytes.Repeat([]byte("b"), size))
		})
		p := start(t, anyPort(port), Spec{Path: filepath.Join(t.TempDir(), "socket"), Port: port})
		for _, s := range p.Listening() {
			c := dial(t, s)
			if _, err := c.Write(bytes.Repeat([]byte("a"), size)); err != nil {
				t.Fatal(err)
			}
			c.CloseWrite()
			if n, err := io.Copy(io.Discard, c); n != size || err != nil {
				t.Errorf("%v: %d bytes came back, %v", s, n, err)
			}
			want := "127.0.0.9"
			if at == "::1" {
				want = at
			}
			if got := <-from; got != want {
				t.Errorf("%v: the program saw %s", s, got)
			}
		}
		if st := p.Stats(); st.Connections != 2 || st.Refused != 0 {
			t.Errorf("%+v", st)
		}
	}
}

// A reset is a reset at the other side, in both directions.
func TestReset(t *testing.T) {
	testkit.CheckLeaks(t)
	ended := make(chan error, 1)
	port := serve(t, "127.0.0.3", func(c *net.TCPConn) {
		var b [1]byte
		c.Read(b[:])
		if b[0] == 'r' {
			c.SetLinger(0)
			return
		}
		_, err := c.Read(b[:])
		ended <- err
	})
	s := start(t, anyPort(port)).Listening()[0]
	c := dial(t, s)
	c.Write([]byte("r"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the program reset, and outside there is %v", err)
	}
	c = dial(t, s)
	c.Write([]byte("w"))
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("outside there was a reset, and the program got %v", err)
	}
}

// A side that does not read holds back the other side.
func TestBackPressure(t *testing.T) {
	testkit.CheckLeaks(t)
	read := make(chan struct{})
	port := serve(t, "127.0.0.3", func(c *net.TCPConn) { <-read })
	c := dial(t, start(t, anyPort(port)).Listening()[0])
	_ = c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	n := 0
	for b := make([]byte, 1<<20); ; {
		m, err := c.Write(b)
		n += m
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if n > 256<<20 {
			t.Error("256 MiB went to a program that reads nothing")
			break
		}
	}
	close(read)
}

func TestNobodyListens(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := net.Listen("tcp4", "127.0.0.3:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	l.Close()
	p := start(t, anyPort(port))
	c, err := net.Dial("tcp", p.Listening()[0].Listen.String())
	if err == nil { // the reset may come even before that
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(testkit.Patience))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v", err)
	}
	testkit.Eventually(t, "the refusal to be counted", func() bool { return p.Stats().Refused == 1 })
}

// Close ends what is open, and leaves neither files nor goroutines.
func TestClose(t *testing.T) {
	testkit.CheckLeaks(t)
	port := serve(t, "127.0.0.3", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	path := filepath.Join(t.TempDir(), "socket")
	p := start(t, anyPort(port), Spec{Path: path, Port: port}, Spec{UDP: true, Listen: netip.AddrPortFrom(lo4, 0), Port: port})
	c := dial(t, p.Listening()[0])
	u, err := net.Dial("udp", p.Listening()[2].Listen.String())
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	u.Write([]byte("x"))
	testkit.Eventually(t, "two open flows", func() bool { return p.Stats().Open == 2 })
	p.Close()
	p.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the unix socket is still there: %v", err)
	}
	if n := p.Stats().Open; n != 0 {
		t.Errorf("%d are open", n)
	}
}

func TestUnixSocket(t *testing.T) {
	testkit.CheckLeaks(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Specs: []Spec{{Path: path, Port: 80}}, Sockets: here{}, Targets: targets, Datagrams: targets,
		Log: slog.New(slog.DiscardHandler),
	}
	if _, err := Start(cfg); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("somebody listens: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close() // as kill -9 leaves it
	p, err := Start(cfg)
	if err != nil {
		t.Fatalf("nobody listens: %v", err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	p.Close()
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(cfg); err == nil || !strings.Contains(err.Error(), "cannot publish "+path+":80: another file is there") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "mine" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// Nothing listens if one of the ports cannot be had.
func TestStartFails(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().(*net.TCPAddr).AddrPort()
	_, err = Start(Config{
		Specs: []Spec{
			anyPort(80),
			{Listen: taken, Port: 80},
		}, Sockets: here{}, Targets: targets, Datagrams: targets, Log: slog.New(slog.DiscardHandler),
	})
	want := fmt.Sprintf("cannot publish %v:80: address already in use: choose another port, as in --publish 8081:8080", taken)
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// An error says what to do about it.
func TestHints(t *testing.T) {
	low := Spec{Listen: netip.MustParseAddrPort("127.0.0.1:80"), Port: 8080}
	high := Spec{Listen: netip.MustParseAddrPort("127.0.0.1:8080"), Port: 80}
	path := Spec{Path: "/s", Port: 80}
	for _, c := range []struct {
		at   Spec
		err  error
		want string
	}{
		{low, syscall.EACCES, "--publish 8080:8080, or run 'sysctl -w net.ipv4.ip_unprivileged_port_start=80' as root"},
		{high, syscall.EADDRINUSE, "choose another port"},
		{high, syscall.EADDRNOTAVAIL, "the host does not have this address"},
		{path, syscall.EACCES, "choose a directory that you may write to"},
		{path, syscall.EROFS, "choose a directory that you may write to"},
		{path, syscall.EADDRINUSE, "choose another path"},
		{path, syscall.ENOENT, "make its directory"},
	} {
		if got := c.at.hint(c.err); !strings.Contains(got, c.want) {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		"6800":                 "127.0.0.1:6800:6800",
		"8080:80":              "127.0.0.1:8080:80",
		"0:80/tcp":             "127.0.0.1:0:80",
		"53:5353/udp":          "127.0.0.1:53:5353/udp",
		"0.0.0.0:80":           "0.0.0.0:80:80",
		"192.0.2.1:8080:80":    "192.0.2.1:8080:80",
		"[::1]:80":             "[::1]:80:80",
		"[2001:db8::1]:80:81":  "[2001:db8::1]:80:81",
		"":                     `"" is not a port number`,
		"0":                    "0 stands for any port of the host, and needs the program's port behind it, as in 0:6800",
		"80:0":                 `"0" is not a port number`,
		"80/sctp":              `"sctp" is neither tcp nor udp`,
		"a:80:80":              `"a" is not an IPv4 address`,
		"localhost.:80":        `"localhost." is not an IPv4 address`,
		"1:2:3:4":              "an IPv6 address is written in brackets, as in [::1]:8080:80",
		"::1:80:80":            "an IPv6 address is written in brackets, as in [::1]:8080:80",
		"224.0.0.1:80":         "224.0.0.1 is not the address of a host",
		"255.255.255.255:80":   "255.255.255.255 is not the address of a host",
		"[ff02::1]:80/udp":     "ff02::1 is not the address of a host",
		"[fe80::1]:80":         "fe80::1 needs its device, as in [fe80::1%eth0]:8080:80",
		"[fe80::1%eth0]:80":    "[fe80::1%eth0]:80:80",
		"[::1]80":              ErrForm.Error(),
		"[127.0.0.1]:80":       `"127.0.0.1" is not an IPv6 address`,
		"65536":                `"65536" is not a port number`,
		"10.0.0.1":             "the port is missing",
		"[::ffff:10.0.0.1]:80": "10.0.0.1:80:80",
	} {
		s, err := Parse(in)
		got := s.String()
		if err != nil {
			got = err.Error()
		} else if again, err := Parse(got); again != s || err != nil {
			t.Errorf("%q: %q is read as %+v, %v", in, got, again, err)
		}
		if got != want && !(in == "1:2:3:4" && err != nil) {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
	if s, err := ParseUnix("/run/a:b:80"); err != nil || s.Path != "/run/a:b" || s.Port != 80 || s.String() != "/run/a:b:80" {
		t.Errorf("%+v, %v", s, err)
	}
	for _, bad := range []string{"", ":80", "/a", "/a:0", "/a:x"} {
		if s, err := ParseUnix(bad); err == nil {
			t.Errorf("%q: %+v", bad, s)
		}
	}
}
