package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// socketsSpec is testSpec with a maker of sockets.
func socketsSpec(argv ...string) Spec {
	s := testSpec(argv...)
	s.Sockets, s.Local = true, []netip.Prefix{netip.MustParsePrefix("198.18.0.3/32"), netip.MustParsePrefix("fd00:77::3/128")}
	return s
}

// TestSpawnSockets makes sockets inside, while the program does not know of it, and reaches a listener on its loopback.
func TestSpawnSockets(t *testing.T) {
	testkit.CheckLeaks(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	// The program waits until its standard input ends, and then has no child that it did not start.
	s := socketsSpec("/bin/sh", "-c", `read end; cat /proc/$$/task/$$/children`)
	s.Stdin = r
	out, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	defer outW.Close()
	s.Stdout = outW
	c := spawn(t, s)
	defer c.Close()
	if err := c.Exec(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	outW.Close()
	makesSockets(t, c.Sockets)
	w.Close()
	if exit, err := c.Wait(); exit != 0 || err != nil { // its standard input has ended
		t.Errorf("%d, %v", exit, err)
	}
	var b [100]byte
	n, _ := out.Read(b[:])
	if got := strings.Fields(string(b[:n])); len(got) != 1 { // cat
		t.Errorf("the program has children: %q", b[:n])
	}
	pid := c.Sockets.pid
	c.Sockets.Close()
	c.Sockets.Close()
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		t.Error("the maker is still there")
	}
	if _, err := c.Sockets.Socket(unix.AF_INET, unix.SOCK_STREAM); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// makesSockets reaches listeners inside, on the loopback and at the TUN's address, and is refused sockets of other kinds.
func makesSockets(t *testing.T, s *Sockets) {
	t.Helper()
	for _, a := range []struct {
		domain       int
		at, from, in string
	}{
		{unix.AF_INET, "127.0.0.1", "198.18.0.3", "10.77.0.1"},
		{unix.AF_INET6, "::1", "fd00:77::3", "fd00:77::1"},
	} {
		l := listenInside(t, s, a.domain, a.at)
		to := netip.MustParseAddrPort(l.Addr().String())
		got, from := reach(t, s, a.domain, netip.MustParseAddr(a.from), to, l)
		if got != "hello" || from.Addr() != netip.MustParseAddr(a.from) {
			t.Errorf("%s: %q from %v", a.at, got, from)
		}
		l.Close()
		// The namespace is the program's: the TUN's address is there.
		listenInside(t, s, a.domain, a.in).Close()
	}
	for _, bad := range [][2]int{{unix.AF_UNIX, unix.SOCK_STREAM}, {unix.AF_INET, unix.SOCK_RAW},
		{unix.AF_PACKET, unix.SOCK_DGRAM}} {
		if _, err := s.Socket(bad[0], bad[1]); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// The maker has no capability, in whatever user namespace.
func TestSpawnMakerHasNoCapability(t *testing.T) {
	testkit.CheckLeaks(t)
	c := spawn(t, socketsSpec("true"))
	defer c.Close()
	fd, err := c.Sockets.Socket(unix.AF_INET, unix.SOCK_STREAM) // it has dropped them once it answers
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Sockets.pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
}

// listenInside listens in the namespace of s.
func listenInside(t *testing.T, s *Sockets, domain int, at string) net.Listener {
	t.Helper()
	fd, err := s.Socket(domain, unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(netip.MustParseAddr(at), 0))); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 8); err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// reach connects to l from the address from, and returns what l received and from where.
func reach(t *testing.T, s *Sockets, domain int, from netip.Addr, to netip.AddrPort, l net.Listener) (string, netip.AddrPort) {
	t.Helper()
	fd, err := s.Socket(domain, unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "client")
	defer f.Close()
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(from, 0))); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil && err != unix.EINPROGRESS {
		t.Fatal(err)
	}
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	end, _ := ctx.Deadline()
	if err := in.SetDeadline(end); err != nil {
		t.Fatal(err)
	}
	if err := f.SetDeadline(time.Now().Add(testkit.Patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := in.Read(b); err != nil {
		t.Fatal(err)
	}
	return string(b), in.RemoteAddr().(*net.TCPAddr).AddrPort()
}
