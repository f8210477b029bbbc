package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// app is a program under `viasocks run`, and the viasocks that carries it.
type app struct {
	t    testing.TB
	cmd  *exec.Cmd
	log  *harness.Log
	mu   sync.Mutex // one request to the agent at a time
	conn *net.UnixConn
	done chan error
}

// startApp starts viasocks run with flags and the agent as its program, and waits until the agent is there.
func startApp(t testing.TB, flags ...string) *app {
	t.Helper()
	return startAppWith(t, "", flags...)
}

// startAppWith is startApp with a variable for the agent.
func startAppWith(t testing.TB, env string, flags ...string) *app {
	t.Helper()
	needWorld(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "agent")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := &app{t: t, log: &harness.Log{}, done: make(chan error, 1)}
	args := append([]string{"run", "--log-level", "info"}, flags...)
	a.cmd = exec.Command(viasocks, append(args, "--", self)...)
	a.cmd.Env = append(os.Environ(), envAgent+"="+path)
	if env != "" {
		a.cmd.Env = append(a.cmd.Env, env)
	}
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { a.done <- a.cmd.Wait() }()
	t.Cleanup(a.stop)
	l.SetDeadline(time.Now().Add(2 * testkit.Patience))
	if a.conn, err = l.AcceptUnix(); err != nil {
		t.Fatalf("the program did not start: %v\n%s", err, a.log)
	}
	return a
}

// stop ends the agent, and so viasocks, and holds it to a clean exit.
func (a *app) stop() {
	if a.conn != nil {
		a.conn.Close()
	}
	select {
	case err := <-a.done:
		if err != nil && !a.t.Failed() {
			a.t.Errorf("viasocks run ended with %v\n%s", err, a.log)
		}
	case <-time.After(2 * testkit.Patience):
		a.t.Errorf("viasocks run did not end after its program\n%s", a.log)
		a.cmd.Process.Kill()
		<-a.done
	}
	if a.t.Failed() {
		a.t.Logf("viasocks said:\n%s", harness.Tail(a.log.String(), 60))
	}
	if strings.Contains(a.log.String(), "DATA RACE") || strings.Contains(a.log.String(), "panic:") {
		a.t.Errorf("viasocks crashed:\n%s", a.log)
	}
}

// socket opens a socket in the app's namespace.
func (a *app) socket(family, typ int) int {
	a.t.Helper()
	fd, err := a.trySocket(family, typ)
	if err != nil {
		a.t.Fatal(err)
	}
	return fd
}

func (a *app) trySocket(family, typ int) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conn.SetDeadline(time.Now().Add(testkit.Patience))
	if _, err := a.conn.Write([]byte{byte(family), byte(typ), 0}); err != nil {
		return -1, fmt.Errorf("cannot ask the agent: %w", err)
	}
	oob := make([]byte, unix.CmsgSpace(4))
	var b [1]byte
	_, n, _, _, err := a.conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		return -1, fmt.Errorf("cannot hear the agent: %w", err)
	}
	fd, err := harness.Descriptor(oob[:n])
	if err == nil {
		unix.CloseOnExec(fd)
	}
	return fd, err
}

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func family(ap netip.AddrPort) int {
	if ap.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// connect is a blocking connect() of a fresh TCP socket: what the program sees, and how long it took.
func (a *app) connect(dst netip.AddrPort) (fd int, took time.Duration, err error) {
	a.t.Helper()
	fd, took, err = a.tryConnect(dst)
	if fd < 0 {
		a.t.Fatal(err)
	}
	return fd, took, err
}

// tryConnect is connect for any goroutine. fd is -1 when there is no socket.
func (a *app) tryConnect(dst netip.AddrPort) (fd int, took time.Duration, err error) {
	if fd, err = a.trySocket(family(dst), unix.SOCK_STREAM); err != nil {
		return -1, 0, err
	}
	start := time.Now()
	err = unix.Connect(fd, sockaddr(dst))
	// The Go runtime's own signals interrupt it: then wait for the end as poll() would.
	for errors.Is(err, unix.EINTR) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, _ := unix.Poll(p, 1000); n <= 0 {
			continue
		}
		soerr, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err = nil; soerr != 0 {
			err = syscall.Errno(soerr)
		}
	}
	return fd, time.Since(start), err
}

// tcp connects and gives the connection as a net.Conn; it is closed with the test.
func (a *app) tcp(dst netip.AddrPort) *net.TCPConn {
	a.t.Helper()
	fd, _, err := a.connect(dst)
	if err != nil {
		unix.Close(fd)
		a.t.Fatalf("connect(%v): %v", dst, err)
	}
	c := fileConn(a.t, fd).(*net.TCPConn)
	a.t.Cleanup(func() { c.Close() })
	return c
}

func fileConn(t testing.TB, fd int) net.Conn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// udp opens a UDP socket in the app's namespace, bound to the wildcard of dst's family.
func (a *app) udp(v6 bool) *net.UDPConn {
	a.t.Helper()
	ap := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	if v6 {
		ap = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	}
	fd := a.socket(family(ap), unix.SOCK_DGRAM)
	if err := unix.Bind(fd, sockaddr(ap)); err != nil {
		a.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "udp")
	defer f.Close()
	pc, err := net.FilePacketConn(f)
	if err != nil {
		a.t.Fatal(err)
	}
	c := pc.(*net.UDPConn)
	a.t.Cleanup(func() { c.Close() })
	return c
}

// rss is the resident memory of viasocks in bytes; fds how many descriptors it has.
func (a *app) rss() int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", a.cmd.Process.Pid))
	if err != nil {
		a.t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		a.t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

func (a *app) fds() int {
	e, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid))
	if err != nil {
		a.t.Fatal(err)
	}
	return len(e)
}

// goroutines is how many viasocks had each time that it gave memory back (--log-level debug).
func (a *app) goroutines() (n []int) {
	for line := range strings.Lines(a.log.String()) {
		if _, count, ok := strings.Cut(line, "goroutines="); ok && strings.Contains(line, "memory given back") {
			if g, err := strconv.Atoi(strings.TrimSpace(count)); err == nil {
				n = append(n, g)
			}
		}
	}
	return n
}

// cpu is the CPU time that viasocks has used.
func (a *app) cpu() time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.cmd.Process.Pid))
	if err != nil {
		a.t.Fatal(err)
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}
