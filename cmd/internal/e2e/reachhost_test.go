package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// hostService is a service of the host at one address.
func hostService(t *testing.T, at string) (port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(at, "0"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s\n", strings.Split(r.RemoteAddr, ":")[0])
	})}
	srv.SetKeepAlivesEnabled(false)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// TestReachHostByName reaches a service on the host's loopback by name in every mode of DNS, as root and as an ordinary user. The
// proxy is not asked for anything.
func TestReachHostByName(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip(err)
	}
	proxy := listenSOCKS(t)
	port := hostService(t, "127.0.0.1")
	asUsers(t, func(t *testing.T, uid int, dir string) {
		for _, mode := range []string{"fake", "relay", "tcp://203.0.113.1", "off"} {
			script := fmt.Sprintf("curl -sS -4 http://host.viasocks.internal:%d/ && curl -sS -6 "+
				"http://host.viasocks.internal:%[1]d/", port)
			script += "; grep -q localhost /etc/hosts || echo no localhost"
			cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--dns", mode, "--reach-host", fmt.Sprint(port), "--",
				"sh", "-c", script)
			cmd.Env, cmd.Dir = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir}, dir
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
			out, err := output(cmd)
			if err != nil || out != "hello 127.0.0.1\nhello 127.0.0.1\n" {
				t.Errorf("--dns %s: %v\n%s", mode, err, out)
			}
		}
	})
	for _, r := range proxy.Requests() {
		t.Errorf("the proxy was asked for %+v", r)
	}
}

// output runs cmd and returns what it wrote. It does not hang.
func output(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = testkit.Patience
	if err := cmd.Start(); err != nil {
		return "", err
	}
	late := time.AfterFunc(2*testkit.Patience, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	err := cmd.Wait()
	return out.String(), err
}

// TestReachHost: connect() tells the truth about services of the host, data, FIN and RST cross unchanged, and nothing but the
// ports that were named is reached, at no other address.
func TestReachHost(t *testing.T) {
	if !apart(t) {
		return
	}
	proxy := listenSOCKS(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hidden, _ := listenTCP(t, "127.0.0.1")
	open := l.Addr().(*net.TCPAddr).AddrPort().Port()
	closed := closedPort(t)
	a := startApp(t, "--proxy", proxy.URL(), "--reach-host", fmt.Sprintf("%d,%d", open, closed))
	for _, to := range []netip.Addr{flow.Gateway4, flow.Gateway6} {
		for _, port := range []uint16{closed, hidden.Addr().(*net.TCPAddr).AddrPort().Port()} {
			fd, took, err := a.connect(netip.AddrPortFrom(to, port))
			unix.Close(fd)
			if !errors.Is(err, unix.ECONNREFUSED) || took > testkit.Patience/2 {
				t.Errorf("port %d: %v after %v", port, err, took)
			}
		}
		talkToService(t, l, a.tcp(netip.AddrPortFrom(to, open)))
	}
	for _, other := range []netip.Addr{flow.Outside4, flow.Outside6} {
		fd, _, err := a.connect(netip.AddrPortFrom(other, open))
		unix.Close(fd)
		if err == nil {
			t.Errorf("%v is reached", other)
		}
	}
	if n := len(proxy.Requests()); n != 0 {
		t.Errorf("the proxy was asked %d times", n)
	}
}

// talkToService checks both directions, a FIN of the program, and a reset of the service.
func talkToService(t *testing.T, l net.Listener, c *net.TCPConn) {
	t.Helper()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	deadline := time.Now().Add(testkit.Patience)
	_, _ = s.SetDeadline(deadline), c.SetDeadline(deadline)
	const size = 4 << 20
	var sides sync.WaitGroup
	sides.Go(func() { c.Write(make([]byte, size)); c.CloseWrite() })
	if n, err := io.Copy(io.Discard, s); n != size || err != nil {
		t.Errorf("the service got %d bytes, %v", n, err)
	}
	sides.Wait()
	if _, err := s.Write([]byte("after your FIN")); err != nil {
		t.Error(err)
	}
	b := make([]byte, 100)
	if n, err := c.Read(b); string(b[:n]) != "after your FIN" || err != nil {
		t.Errorf("the program got %q, %v", b[:n], err)
	}
	s.(*net.TCPConn).SetLinger(0)
	s.Close()
	if _, err := c.Read(b); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the service reset, and the program got %v", err)
	}
}

// closedPort is one on which nobody listens.
func closedPort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// TestReachHostUDP: datagrams go to a service of the host and come back from the address that was asked, and a port on
// which nobody listens is an error at once. Nobody else on the host can write to the program.
func TestReachHostUDP(t *testing.T) {
	proxy := listenSOCKS(t)
	for _, at := range []string{"127.0.0.1", "::1"} {
		c, err := net.ListenPacket("udp", net.JoinHostPort(at, "0"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		from := make(chan net.Addr, 100)
		go func() {
			b := make([]byte, 1<<16)
			for n, who, err := c.ReadFrom(b); err == nil; n, who, err = c.ReadFrom(b) {
				select {
				case from <- who:
				default:
				}
				_, _ = c.WriteTo(b[:n], who)
			}
		}()
		port := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		a := startApp(t, "--proxy", proxy.URL(), "--reach-host", "all")
		for _, to := range []netip.Addr{flow.Gateway4, flow.Gateway6} {
			u := a.udp(to.Is6())
			big := strings.Repeat("x", 9000)
			echoUDP(t, u, netip.AddrPortFrom(to, port), "small")
			echoUDP(t, u, netip.AddrPortFrom(to, port), big)
			who := <-from
			stranger, err := net.Dial("udp", who.String())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = stranger.Write([]byte("strange"))
			stranger.Close()
			echoUDP(t, u, netip.AddrPortFrom(to, port), "again") // fails if it reads "strange"
		}
		refusedUDP(t, a, netip.AddrPortFrom(flow.Gateway4, closedPort(t)))
	}
}

// echoUDP sends until the echo comes back.
func echoUDP(t *testing.T, u *net.UDPConn, to netip.AddrPort, text string) {
	t.Helper()
	b := make([]byte, 1<<16)
	testkit.Eventually(t, "an echo from "+to.String(), func() bool {
		if _, err := u.WriteToUDPAddrPort([]byte(text), to); err != nil {
			return false
		}
		_ = u.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err == nil && (netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != to || n == len("strange") &&
			string(b[:n]) == "strange") {
			t.Fatalf("%q from %v", b[:n], from)
		}
		return err == nil && string(b[:n]) == text
	})
}

// refusedUDP sends from a connected socket until the kernel says that nobody listens.
func refusedUDP(t *testing.T, a *app, to netip.AddrPort) {
	t.Helper()
	fd := a.socket(family(to), unix.SOCK_DGRAM)
	defer unix.Close(fd)
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, "port unreachable", func() bool {
		_, err := unix.Write(fd, []byte("x"))
		return errors.Is(err, unix.ECONNREFUSED)
	})
}

// TestReachHostProxy: with `all`, the proxy that viasocks itself uses stays out of reach unless its port is named.
// status and flows show the upstream.
func TestReachHostProxy(t *testing.T) {
	proxy := listenSOCKS(t)
	at := netip.MustParseAddrPort(proxy.Addr().String())
	a := startApp(t, "--proxy", proxy.URL(), "--reach-host", "all")
	fd, _, err := a.connect(netip.AddrPortFrom(flow.Gateway4, at.Port()))
	unix.Close(fd)
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the proxy is reached: %v", err)
	}
	l, _ := listenTCP(t, "127.0.0.1")
	a.tcp(netip.AddrPortFrom(flow.Gateway4, l.Addr().(*net.TCPAddr).AddrPort().Port()))
	pid := fmt.Sprint(a.cmd.Process.Pid)
	for command, want := range map[string]string{"status": "loopback of this host, port all", "flows": "host.viasocks.internal"} {
		cmd := exec.Command(viasocks, command, "--pid", pid)
		if out, err := output(cmd); err != nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
	}
	b := startApp(t, "--proxy", proxy.URL(), "--reach-host", fmt.Sprint(at.Port()))
	b.tcp(netip.AddrPortFrom(flow.Gateway4, at.Port()))
}
