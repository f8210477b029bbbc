package e2e

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
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

// webServer is nginx at ports 80 and 443 of the world, with a certificate of its own.
func webServer(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cert, chain, err := sockstest.Certificate(world4)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf(`daemon off; master_process off; pid %s/pid; error_log stderr; events { }
http { access_log off; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f;
uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s; server { listen %[2]s:80; listen %[2]s:443 ssl; root %[1]s;
ssl_certificate %[1]s/cert; ssl_certificate_key %[1]s/key; } }`, dir, world4)
	for name, text := range map[string]string{
		"index.html": "served", "conf": conf, "cert": string(chain),
		"key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, world4+":443", "nginx", "-c", filepath.Join(dir, "conf"), "-e", "stderr")
}

// fetch is curl of URLs whose hosts are all at one address, which it knows without a question of DNS. It gives the exit codes and
// what came.
func fetch(t *testing.T, flags []string, urls ...string) []string {
	t.Helper()
	script := ""
	for _, u := range urls {
		host := strings.Split(u, "/")[2]
		script += fmt.Sprintf(
			"b=$(curl -sk -m 10 --noproxy '*' --resolve %s:80:%s --resolve %[1]s:443:%[2]s %[3]s); echo $? $b\n",
			host,
			world4,
			u,
		)
	}
	r := run(t, flags, "sh", "-c", script)
	if r.stderr != "" {
		t.Logf("standard error: %s", r.stderr)
	}
	return strings.Split(strings.TrimSpace(strings.ReplaceAll(r.out, " \n", "\n")), "\n")
}

// TestSniff is --sniff with curl and nginx: what a rule refuses by name ends by RST, the rest is served, and the proxy is told
// addresses or names.
func TestSniff(t *testing.T) {
	needPrograms(t, "nginx", "curl")
	webServer(t)
	proxy := listenSOCKS(t, sockstest.WithResolve(func(name string) (netip.Addr, error) {
		if strings.HasSuffix(name, ".example") {
			return netip.MustParseAddr(world4), nil
		}
		return netip.Addr{}, errors.New("there is no such name")
	}))
	urls := []string{"https://good.example/", "http://good.example/", "https://a.bad.example/", "http://a.bad.example/"}
	dsts := func() (all []string) {
		for _, r := range proxy.Requests() {
			all = append(all, r.Dst.String())
		}
		return all
	}
	seen := 0
	for _, row := range []struct {
		mode string
		want string // exit codes: 35 and 56 are a TLS handshake and an answer that end by RST
		dsts string
	}{
		{"off", "0 served|0 served|0 served|0 served",
			"203.0.113.1:443 203.0.113.1:80 203.0.113.1:443 203.0.113.1:80"},
		{"rules", "0 served|0 served|35|56", "203.0.113.1:443 203.0.113.1:80"},
		{"name", "0 served|0 served|35|56", "good.example:443 good.example:80"},
	} {
		t.Run(row.mode, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "decisions")
			got := fetch(
				t,
				// On a machine that stalls, curl may take longer than the default for its first word.
				[]string{"--proxy", proxy.URL(), "--sniff", row.mode, "--sniff-wait", "10s", "--rule", "name .bad.example reject",
					"--decisions", file},
				urls...)
			if strings.Join(got, "|") != row.want {
				t.Errorf("curl: %q, want %s", got, row.want)
			}
			all := dsts()
			if d := strings.Join(all[seen:], " "); d != row.dsts {
				t.Errorf("the proxy was asked for %s, want %s", d, row.dsts)
			}
			seen = len(all)
			names := ""
			for _, d := range decisionsIn(t, file) {
				names += strings.Join(d.Names, ",") + " " + d.Verdict + ";"
			}
			want := "good.example via proxy;good.example via proxy;a.bad.example reject;a.bad.example reject;"
			if row.mode == "off" {
				want = strings.Repeat(" via proxy;", 4)
			}
			if names != want {
				t.Errorf("decisions %q, want %q", names, want)
			}
		})
	}
}

// TestSniffOpenSSH: the client speaks first, and so even on port 443 it does not wait. ssh-keyscan has no need of a key.
func TestSniffOpenSSH(t *testing.T) {
	needPrograms(t, "ssh-keyscan", "ssh-keygen", "/usr/sbin/sshd")
	dir := t.TempDir()
	_ = os.MkdirAll("/run/sshd", 0o755) // sshd's own, which may be there
	key := filepath.Join(dir, "host")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	serve(t, world4+":443", "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", key, "-p", "443",
		"-o", "ListenAddress="+world4, "-o", "UsePAM=no", "-o", "PidFile=none")
	proxy := listenSOCKS(t)
	r := run(t, []string{"--proxy", proxy.URL(), "--sniff", "rules", "--rule", "name .bad.example reject"},
		"ssh-keyscan", "-T", "20", "-t", "ed25519", "-p", "443", world4)
	if r.exit != 0 || !strings.Contains(r.out, "ssh-ed25519") {
		t.Errorf("ssh-keyscan: %d, %q, %s", r.exit, r.out, r.stderr)
	}
}

// at443 listens at port 443 of the world.
func at443(t *testing.T) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	needWorld(t)
	dst := netip.MustParseAddrPort(world4 + ":443")
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(dst))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, dst
}

// far is the connection that the proxy makes for the app's.
func far(t *testing.T, l *net.TCPListener) *net.TCPConn {
	t.Helper()
	l.SetDeadline(time.Now().Add(testkit.Patience))
	c, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(testkit.Patience))
	t.Cleanup(func() { c.Close() })
	return c
}

// TestSniffStreams: what the program sends, and how it ends, passes as without --sniff; a server that speaks first is late by the
// wait and no more, and on another port not at all.
func TestSniffStreams(t *testing.T) {
	const wait = 500 * time.Millisecond
	l, dst := at443(t)
	proxy := listenSOCKS(t)
	flags := []string{"--proxy", proxy.URL(), "--sniff", "rules", "--rule", "name .bad.example reject", "--sniff-wait"}
	a := startApp(t, append(flags, wait.String())...)

	other, otherDst := listenTCP(t, world4)
	for _, row := range []struct {
		l       *net.TCPListener
		dst     netip.AddrPort
		delayed bool
	}{{other, otherDst, false}, {l, dst, true}, {other, otherDst, false}} {
		start := time.Now()
		c := a.tcp(row.dst)
		f := far(t, row.l)
		f.Write([]byte("hello"))
		c.SetDeadline(time.Now().Add(testkit.Patience))
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
			t.Fatalf("%v: %q, %v", row.dst, b, err)
		}
		if took := time.Since(start); row.delayed && took < wait || took > wait+10*time.Second {
			t.Errorf("%v: the server's first word came after %v", row.dst, took)
		} else {
			t.Logf("%v: the server's first word came after %v", row.dst, took)
		}
	}

	// Half-close, in the middle of what could be a name, behind it, and at once.
	for _, first := range []string{"GET / HT", "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", "\x16\x03\x01", ""} {
		c := a.tcp(dst)
		c.SetDeadline(time.Now().Add(testkit.Patience))
		c.Write([]byte(first))
		c.CloseWrite()
		f := far(t, l)
		if got, err := io.ReadAll(f); string(got) != first || err != nil {
			t.Errorf("%q: the server reads %q, %v", first, got, err)
		}
		f.Write([]byte("answer"))
		f.Close()
		if got, err := io.ReadAll(c); string(got) != "answer" || err != nil {
			t.Errorf("%q: the program reads %q, %v", first, got, err)
		}
	}

	// A program that closes at once has sent FIN; one that resets is not dialled for. Neither end takes as long as this wait.
	patient := startApp(t, append(flags, "10s")...)
	before := len(proxy.Requests())
	c := patient.tcp(dst)
	reset(c)
	c = patient.tcp(dst)
	c.Close()
	if got, err := io.ReadAll(far(t, l)); len(got) != 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("closed at once: the server reads %q, %v", got, err)
	}
	if n := len(proxy.Requests()) - before; n != 1 {
		t.Errorf("the proxy was asked %d times for a reset and a closed connection", n)
	}

	// A dial that fails is a RST.
	proxy.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(5) })
	c = a.tcp(dst)
	c.SetDeadline(time.Now().Add(testkit.Patience))
	c.Write([]byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("refused: %v", err)
	}
}
