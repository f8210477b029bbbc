package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// browser fetches pages as a person's browser would, by TCP or by a unix socket.
func browser(unixPath string) *http.Client {
	tr := &http.Transport{DisableKeepAlives: true}
	if unixPath != "" {
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", unixPath)
		}
	}
	return &http.Client{Transport: tr, Timeout: testkit.Patience}
}

// get returns the status, the body, and a header's value.
func get(c *http.Client, url, header string) (status int, body, value string, err error) {
	r, err := c.Get(url)
	if err != nil {
		return 0, "", "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), r.Header.Get(header), err
}

// TestPublishTransmission opens the web interface of a real transmission-daemon and calls its RPC interface by a
// published TCP port and by a unix socket, as root and as an ordinary user.
func TestPublishTransmission(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	if _, err := exec.LookPath("transmission-daemon"); err != nil {
		t.Skip(err)
	}
	proxy := listenSOCKS(t)
	asUsers(t, func(t *testing.T, uid int, dir string) {
		path := filepath.Join(dir, "web")
		cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--log-level", "info", "--publish", "0:9091",
			"--publish-unix", path+":9091", "--", "transmission-daemon", "-f", "-g", filepath.Join(dir, "config"),
			"-w", dir, "-T", "-a", "127.0.0.1,198.18.0.3", "-p", "9091")
		cmd.Env, cmd.Dir = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		base := "http://127.0.0.1:" + startPublished(t, cmd)
		for _, c := range []*http.Client{browser(""), browser(path)} {
			var page string
			testkit.Eventually(t, "the page of transmission", func() bool {
				var status int
				status, page, _, _ = get(c, base+"/transmission/web/", "")
				return status == http.StatusOK && strings.Contains(page, "Transmission")
			})
			script := regexp.MustCompile(`src="\./(javascript/[^"]+)"`).FindStringSubmatch(page)
			if script == nil {
				t.Fatalf("the page has no scripts:\n%s", page)
			}
			status, body, _, err := get(c, base+"/transmission/web/"+script[1], "")
			if status != http.StatusOK || len(body) < 1000 {
				t.Errorf("%s: %d, %d bytes, %v", script[1], status, len(body), err)
			}
			const header = "X-Transmission-Session-Id"
			status, _, session, err := get(c, base+"/transmission/rpc", header)
			if status != http.StatusConflict || session == "" {
				t.Errorf("%d, %q, %v", status, session, err)
			}
			q, err := http.NewRequest(http.MethodPost, base+"/transmission/rpc", strings.NewReader(`{"method":"session-get"}`))
			if err != nil {
				t.Fatal(err)
			}
			q.Header.Set(header, session)
			r, err := c.Do(q)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r.Body)
			r.Body.Close()
			if err != nil || !strings.Contains(string(b), `"result":"success"`) {
				t.Errorf("%s, %v", b, err)
			}
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the unix socket is still there: %v", err)
		}
	})
}

// published returns the address of the host at which a port of the app is published.
func (a *app) published(t *testing.T, port int) netip.AddrPort {
	t.Helper()
	var at netip.AddrPort
	pattern := regexp.MustCompile(fmt.Sprintf(`port=("?)(\S+):%d(/udp)?("?)\s`, port))
	testkit.Eventually(t, "the published port", func() bool {
		m := pattern.FindStringSubmatch(a.log.String())
		if m == nil {
			return false
		}
		var err error
		if at, err = netip.ParseAddrPort(m[2]); err != nil {
			t.Fatal(err)
		}
		return true
	})
	return at
}

// listenInside makes the app listen.
func (a *app) listenInside(t *testing.T, at string) net.Listener {
	t.Helper()
	to := netip.MustParseAddrPort(at)
	fd := a.socket(family(to), unix.SOCK_STREAM)
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	if err := unix.Bind(fd, sockaddr(to)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 16); err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestPublishedTruth: FIN, RST, and a side that does not read are the same on both sides of a published port, wherever
// the program listens and wherever its port is published.
func TestPublishedTruth(t *testing.T) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--publish", "0:7001", "--publish", "[::1]:0:7002", "--publish", "[::]:0:7003")
	for _, c := range []struct {
		listen string
		port   int
	}{{"127.0.0.1:7001", 7001}, {"[::1]:7002", 7002}, {"198.18.0.1:7003", 7003}} {
		l := a.listenInside(t, c.listen)
		to := a.published(t, c.port)
		if to.Addr().IsUnspecified() {
			to = netip.AddrPortFrom(netip.IPv6Loopback(), to.Port())
		}
		dial := func() *net.TCPConn {
			d, err := net.DialTimeout("tcp", to.String(), testkit.Patience)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { d.Close() })
			return d.(*net.TCPConn)
		}
		talkToService(t, l, dial())
		out := dial() // the client resets
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = in.SetDeadline(time.Now().Add(testkit.Patience))
		_ = out.SetLinger(0)
		_ = out.Close()
		if _, err := in.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: the client reset, and the program got %v", c.listen, err)
		}
		in.Close()
		out = dial() // the program reads nothing
		if in, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		_ = out.SetWriteDeadline(time.Now().Add(time.Second))
		n := 0
		for err = nil; err == nil && n < 256<<20; {
			var m int
			m, err = out.Write(make([]byte, 1<<20))
			n += m
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %d bytes were taken from a client whose program reads nothing: %v", c.listen, n, err)
		}
		in.Close()
	}
}

// TestPublishedUDP: datagrams of both families reach a program of either, and the answers come from where they were sent to.
func TestPublishedUDP(t *testing.T) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--publish", "0:7011/udp", "--publish", "[::1]:0:7012/udp",
		"--publish", "0:7013/udp", "--publish", "0:7014/udp", "--publish", "[::1]:0:7015/udp")
	for _, c := range []struct {
		listen string
		port   int
	}{
		{"127.0.0.1:7011", 7011}, {"[::1]:7012", 7012},
		{"0.0.0.0:7013", 7013}, {"[::]:7014", 7014}, {"198.18.0.1:7015", 7015}, // these do not say where answers come from
	} {
		at := netip.MustParseAddrPort(c.listen)
		fd := a.socket(family(at), unix.SOCK_DGRAM)
		if err := unix.Bind(fd, sockaddr(at)); err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "udp")
		in, err := net.FilePacketConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close() })
		go func() {
			b := make([]byte, 1<<16)
			for n, from, err := in.ReadFrom(b); err == nil; n, from, err = in.ReadFrom(b) {
				_, _ = in.WriteTo(b[:n], from)
			}
		}()
		to := a.published(t, c.port)
		out, err := net.ListenUDP("udp", nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { out.Close() })
		echoUDP(t, out, to, "small")
		echoUDP(t, out, to, strings.Repeat("x", 20000))
	}
}
