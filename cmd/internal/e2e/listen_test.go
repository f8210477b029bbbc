package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// binding starts dante, which lets peers in by BIND at world4, or at other addresses, and returns the URL.
func binding(t *testing.T, externals ...string) (url string) {
	needPrograms(t, "danted")
	danteServer(t, "1086", externals...)
	return "socks5://127.0.0.1:1086"
}

// lastPort is the last one that freePort has given.
var lastPort atomic.Uint32

// freePort returns a port that a server can listen at, a new one each time: after a test the kernel keeps some of them for a
// minute. It is below those that the kernel gives, so that nobody gets it meanwhile.
func freePort(t *testing.T) uint16 {
	t.Helper()
	needWorld(t)
	for range 1000 {
		port := 20_000 + lastPort.Add(1)
		l, err := net.Listen("tcp", fmt.Sprint(":", port))
		if err == nil {
			l.Close()
			return uint16(port)
		}
	}
	t.Fatal("no port is free")
	return 0
}

// listen lets the program listen at all its IPv4 addresses.
func (a *app) listen(port uint16) *net.TCPListener {
	a.t.Helper()
	return a.listenAt(netip.AddrPortFrom(netip.IPv4Unspecified(), port))
}

func (a *app) listenAt(at netip.AddrPort) *net.TCPListener {
	a.t.Helper()
	fd := a.socket(family(at), unix.SOCK_STREAM)
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		a.t.Fatal(err)
	}
	if err := unix.Listen(fd, 128); err != nil {
		a.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// status asks viasocks for its status.
func (a *app) status() (s control.Status) {
	a.t.Helper()
	b, err := exec.Command(viasocks, "status", "--json", "--pid", fmt.Sprint(a.cmd.Process.Pid)).Output()
	if err != nil {
		a.t.Fatalf("status: %v", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		a.t.Fatal(err)
	}
	return s
}

// outer waits until peers can reach the program, not at the endpoint that was used last, and returns where.
func (a *app) outer(not string) (at string) {
	a.t.Helper()
	var p control.ListeningPort
	if !testkit.Until(testkit.Patience, func() bool {
		p = a.status().Listening.Ports[0]
		return p.Outer != "" && p.Outer != not
	}) {
		a.t.Fatalf("no BIND waits but at %q: %+v", not, p)
	}
	return p.Outer
}

// peer connects from other4 or other6 to at, again while the proxy is between two BINDs.
func peer(t *testing.T, at string) net.Conn {
	t.Helper()
	return peerWhere(t, func() string { return at })
}

// peerWhere is peer for an endpoint that may change meanwhile: where is asked before each try.
func peerWhere(t *testing.T, where func() (at string)) net.Conn {
	t.Helper()
	var c net.Conn
	var at string
	var err error
	if !testkit.Until(testkit.Patience, func() bool {
		at = where()
		from := other4
		if strings.HasPrefix(at, "[") {
			from = other6
		}
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: testkit.Patience}
		c, err = d.DialContext(context.Background(), "tcp", at)
		return err == nil
	}) {
		t.Fatalf("no peer gets a connection to %s: %v", at, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func acceptFrom(t *testing.T, l *net.TCPListener, from net.Conn) net.Conn {
	t.Helper()
	l.SetDeadline(time.Now().Add(testkit.Patience))
	c, err := l.Accept()
	if err != nil {
		t.Fatalf("the program accepts nothing: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	if got, want := c.RemoteAddr().String(), from.LocalAddr().String(); got != want {
		t.Fatalf("the program sees a connection from %s, want %s", got, want)
	}
	return c
}

// sendBoth sends 4 MB each way and ends each direction in order.
func sendBoth(t *testing.T, a, b net.Conn) {
	t.Helper()
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		sent := make(chan error, 1)
		go func() {
			_, err := way[0].Write(make([]byte, 4<<20))
			way[0].(*net.TCPConn).CloseWrite()
			sent <- err
		}()
		way[1].SetDeadline(time.Now().Add(testkit.Patience))
		if n, err := io.Copy(io.Discard, way[1]); err != nil || n != 4<<20 {
			t.Fatalf("%d bytes arrived: %v", n, err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	}
}

// TestListenDante: peers reach a program that listens by BIND of a real dante, one after the other at the port that
// was asked for and many at once at others. A peer is reset while the program does not listen, and --on-port is told.
func TestListenDante(t *testing.T) {
	if !apart(t) {
		return
	}
	url := binding(t)
	told := filepath.Join(t.TempDir(), "told")
	hook := writeFile(t, "hook", "#!/bin/sh\n"+
		"echo \"$# $VIASOCKS_LISTEN_PORT $VIASOCKS_OUTER_ADDRESS $VIASOCKS_OUTER_PORT\" >>"+told+"\n")
	if err := os.Chmod(hook, 0o700); err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	a := startApp(t, "--proxy", url, "--listen", fmt.Sprint(port), "--on-port", hook)
	want := fmt.Sprintf("%s:%d", world4, port)
	if at := a.outer(""); at != want {
		t.Fatalf("peers reach the program at %s, want %s", at, want)
	}
	refused := peer(t, want) // nobody listens yet
	refused.SetDeadline(time.Now().Add(testkit.Patience))
	if n, err := refused.Read(make([]byte, 1)); err == nil {
		t.Errorf("the peer reads %d bytes from a program that does not listen", n)
	}
	testkit.Eventually(t, "the count of refused peers", func() bool { return a.status().Listening.Refused == 1 })
	l := a.listen(port)
	// The endpoint of the refused peer is named until the next BIND, for which dante gives another port.
	first := peerWhere(t, func() string { return a.outer("") })
	got := acceptFrom(t, l, first)
	sendBoth(t, first, got)
	first.Close()
	got.Close()
	const many = 20
	var last string
	for i := range many {
		last = a.outer(last)
		c := peer(t, last)
		p := acceptFrom(t, l, c)
		if _, err := fmt.Fprintln(c, i); err != nil {
			t.Fatal(err)
		}
		p.SetDeadline(time.Now().Add(testkit.Patience))
		var n int
		if _, err := fmt.Fscanln(p, &n); err != nil || n != i {
			t.Fatalf("the program reads %d, want %d: %v", n, i, err)
		}
	}
	s := a.status()
	if p := s.Listening.Ports[0]; p.Open != many {
		t.Errorf("%d connections are open, want %d", p.Open, many)
	}
	flows, err := exec.Command(viasocks, "flows", "--pid", fmt.Sprint(a.cmd.Process.Pid)).CombinedOutput()
	if err != nil || strings.Count(string(flows), fmt.Sprintf("198.18.0.1:%d ", port)) != many {
		t.Errorf("flows: %v\n%s", err, flows)
	}
	testkit.Eventually(t, "the command of --on-port", func() bool {
		b, _ := os.ReadFile(told)
		return strings.Contains(string(b), fmt.Sprintf("0 %d %s %[1]d\n", port, world4)) && strings.Count(string(b), "\n") > 1
	})
}

// The port that was asked for is asked for again when its peer has gone.
func TestListenSamePort(t *testing.T) {
	if !apart(t) {
		return
	}
	url, port := binding(t), freePort(t)
	a := startApp(t, "--proxy", url, "--listen", fmt.Sprint(port))
	l := a.listen(port)
	want := fmt.Sprintf("%s:%d", world4, port)
	for range 5 {
		testkit.Eventually(t, "the port that was asked for", func() bool { return a.outer("") == want })
		c := peer(t, want)
		p := acceptFrom(t, l, c)
		a.outer(want) // another port, meanwhile
		c.Close()     // the peer ends it, so that dante's port is free at once
		p.Close()
	}
}

// TestListenRefused: a proxy that does not know BIND is named once and in status, and one that gives impossible
// addresses of peers passes nothing to the program.
func TestListenRefused(t *testing.T) {
	if !apart(t) {
		return
	}
	srv := listenSOCKS(t)
	srv.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Cmd == sockstest.CmdBind {
			return sockstest.Reply(7)
		}
		return sockstest.Fault{}
	})
	a := startApp(t, "--proxy", srv.URL(), "--listen", "6883")
	testkit.Eventually(t, "the reason in status", func() bool {
		p := a.status().Listening.Ports[0]
		return p.Outer == "" && strings.Contains(p.Why, "not supported")
	})
	said := func() int { return strings.Count(a.log.String(), "peers can't connect to the program") }
	testkit.Eventually(t, "the reason in the log", func() bool { return said() > 0 })
	srv.SetFault(nil)
	b := startApp(t, "--proxy", srv.URL(), "--listen", "6884")
	l := b.listen(6884)
	if c, err := net.Dial("tcp", b.outer("")); err == nil { // from 127.0.0.1, which no peer can have; it may be reset at once
		defer c.Close()
	}
	testkit.Eventually(t, "the count of impossible peers", func() bool { return b.status().Listening.Bogus == 1 })
	l.SetDeadline(time.Now().Add(100 * time.Millisecond))
	if c, err := l.Accept(); err == nil {
		t.Errorf("the program got a connection from %v", c.RemoteAddr())
	}
	b.outer("") // the next BIND
	if n := said(); n != 1 {
		t.Errorf("it was logged %d times", n)
	}
}

// TestListenIPv6: where dante has addresses of both IP versions, peers reach a program at the same port of both, and it sees
// them come from their own addresses. A dante with an IPv6 address alone is used by IPv6.
func TestListenIPv6(t *testing.T) {
	for name, externals := range map[string][]string{"both": {world4, world6}, "alone": {world6}} {
		t.Run(name, func(t *testing.T) {
			url, port := binding(t, externals...), freePort(t)
			a := startApp(t, "--proxy", url, "--listen", fmt.Sprint(port))
			l := a.listenAt(netip.AddrPortFrom(netip.IPv6Unspecified(), port)) // which takes IPv4, too
			var p control.ListeningPort
			testkit.Eventually(t, "the port of each version", func() bool {
				p = a.status().Listening.Ports[0]
				return p.Outer6 != "" && (p.Outer != "" || p.Why != "")
			})
			if want := fmt.Sprintf("[%s]:%d", world6, port); p.Outer6 != want {
				t.Errorf("by IPv6 peers reach it at %s, want %s", p.Outer6, want)
			}
			c := peer(t, p.Outer6)
			sendBoth(t, c, acceptFrom(t, l, c))
			if name == "alone" {
				if p.Outer != "" || !strings.Contains(p.Why, "address type not supported") {
					t.Errorf("by IPv4: %+v", p)
				}
				return
			}
			if want := fmt.Sprintf("%s:%d", world4, port); p.Outer != want {
				t.Errorf("by IPv4 peers reach it at %s, want %s", p.Outer, want)
			}
			c = peer(t, p.Outer)
			sendBoth(t, c, acceptFrom(t, l, c))
		})
	}
}

// TestListenSelf: a program that connects to its own port at the proxy, of which a tracker has told it, is refused: else the port
// would be taken from the peers.
func TestListenSelf(t *testing.T) {
	port := freePort(t)
	a := startApp(t, "--proxy", binding(t), "--listen", fmt.Sprint(port))
	a.listen(port)
	at := a.outer("")
	fd, _, err := a.connect(netip.MustParseAddrPort(at))
	defer unix.Close(fd)
	if err != unix.ECONNREFUSED {
		t.Errorf("it connects to itself: %v", err)
	}
	if s := a.status().Listening; s.Accepted != 0 || s.Ports[0].Outer != at {
		t.Errorf("%+v", s)
	}
}
