package socks

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// inNamespace runs the calling test anew in a network namespace that has only lo. It returns true there.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const inside = "VIASOCKS_TEST_NETNS"
	if os.Getenv(inside) == t.Name() {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("ip: %v: %s", err, out)
		}
		return true
	}
	flags := "-n"
	if os.Geteuid() != 0 {
		flags = "-rn"
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", flags, "--", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"="+t.Name(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := cmd.CombinedOutput()
	if strings.Contains(string(out), "unshare failed") {
		t.Skipf("network namespaces are not allowed here: %s", out)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if strings.Contains(string(out), "--- SKIP") {
		t.Log(string(out))
	}
	return false
}

// server starts a program and waits until it listens. The subtest is skipped where the program is not installed.
func server(t *testing.T, at string, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed: scripts/deps.sh test", name)
	}
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		gone := time.AfterFunc(3*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		gone.Stop()
		if t.Failed() {
			t.Logf("%s says:\n%s", name, out.String())
		}
	})
	testkit.Eventually(t, name+" to listen at "+at, func() bool {
		c, err := net.Dial("tcp", at)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func textFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// hears connects by c to what says hello, and reads it.
func hears(t *testing.T, c *Client, dst Addr) {
	t.Helper()
	fd, err := connect(t, c, context.Background(), dst)
	if err != nil {
		t.Errorf("%v to %v: %v", c.Server(), dst, err)
		return
	}
	k := conn(t, fd)
	defer k.Close()
	k.SetDeadline(time.Now().Add(testkit.Patience))
	if b, err := io.ReadAll(k); err != nil || string(b) != "hello" {
		t.Errorf("%v to %v: %q, %v", c.Server(), dst, b, err)
	}
}

// Real servers of Debian: SOCKS4 and BIND of dante, CONNECT of tinyproxy, and TLS of stunnel before microsocks.
func TestRealServers(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	t.Run("dante", realDante)
	t.Run("tinyproxy", realTinyproxy)
	t.Run("stunnel", realStunnel)
}

// refusedAddr is where nobody listens.
var refusedAddr = Addr{IP: netip.MustParseAddr("127.0.0.1"), Port: 9}

func realDante(t *testing.T) {
	const at = "127.0.0.1:1080"
	server(t, at, "danted", "-f", textFile(t, `logoutput: stderr
internal: 127.0.0.1 port = 1080
external: 127.0.0.1
socksmethod: none
clientmethod: none
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 command: connect bind bindreply udpassociate udpreply }
`))
	d := newDialer(t, Options{})
	far := greeter(t)
	for _, scheme := range []string{"socks5", "socks4"} {
		c := d.Client(mustServer(t, scheme+"://"+at))
		hears(t, c, AddrFrom(far))
		want := map[string]Reply{"socks5": ReplyRefused, "socks4": ReplyGeneralFailure}[scheme]
		if _, err := connect(t, c, context.Background(), refusedAddr); !errors.Is(err, want) {
			t.Errorf("%s, refused: %v", scheme, err)
		}
		bound, done := bind(t, c, context.Background(), Addr{IP: netip.MustParseAddr("127.0.0.1"), Port: 20})
		peer, err := net.Dial("tcp", bound.String())
		if err != nil {
			t.Errorf("%s: %v; %+v", scheme, err, wait(t, done))
			continue
		}
		io.WriteString(peer, "hello")
		peer.Close()
		r := wait(t, done)
		if r.err != nil || r.peer != peer.LocalAddr().(*net.TCPAddr).AddrPort() {
			t.Errorf("%s: %+v, want %v", scheme, r, peer.LocalAddr())
			continue
		}
		k := conn(t, r.fd)
		k.SetDeadline(time.Now().Add(testkit.Patience))
		if b, err := io.ReadAll(k); string(b) != "hello" {
			t.Errorf("%s: %q, %v", scheme, b, err)
		}
		k.Close()
	}
	a, err := associate(t, d.Client(mustServer(t, "socks5://"+at)), context.Background())
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
}

func realTinyproxy(t *testing.T) {
	const at = "127.0.0.1:8888"
	server(t, at, "tinyproxy", "-d", "-c", textFile(t, "Port 8888\nListen 127.0.0.1\nTimeout 60\nBasicAuth alice secret\n"))
	d := newDialer(t, Options{})
	c := d.Client(mustServer(t, "http://alice:secret@"+at))
	hears(t, c, AddrFrom(greeter(t)))
	if _, err := connect(t, c, context.Background(), refusedAddr); !errors.Is(err, ReplyGeneralFailure) {
		t.Errorf("refused: %v", err)
	}
	if _, err := connect(t, d.Client(mustServer(t, "http://"+at)), context.Background(), refusedAddr); !errors.Is(err,
		ErrMethod) {
		t.Errorf("without a login: %v", err)
	}
	if _, err := connect(t, d.Client(mustServer(t, "http://alice:x@"+at)), context.Background(), refusedAddr); !errors.Is(err,
		ErrCredentials) {
		t.Errorf("another password: %v", err)
	}
}

func realStunnel(t *testing.T) {
	cert, pem, err := sockstest.Certificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	key, err := sockstest.KeyPEM(cert)
	if err != nil {
		t.Fatal(err)
	}
	server(t, "127.0.0.1:1081", "microsocks", "-i", "127.0.0.1", "-p", "1081")
	server(
		t,
		"127.0.0.1:1443",
		"stunnel4",
		textFile(t, "foreground = yes\npid =\n[socks]\naccept = 127.0.0.1:1443\nconnect = 127.0.0.1:1081\ncert = "+
			textFile(t, string(key)+string(pem))+"\n"),
	)
	d := newDialer(t, Options{})
	s, err := mustServer(t, "socks5+tls://127.0.0.1:1443").WithCA(pem)
	if err != nil {
		t.Fatal(err)
	}
	c := d.Client(s)
	hears(t, c, AddrFrom(greeter(t)))
	if _, err := connect(t, c, context.Background(), refusedAddr); !errors.Is(err, ReplyRefused) {
		t.Errorf("refused: %v", err)
	}
}
