package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// cFetch resolves a name as the C library does and prints what a web server there says.
const cFetch = `
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all, *a;
	int err = getaddrinfo(argv[1], argv[2], &hints, &all), s, n;
	char b[4096];
	if (err) { puts(gai_strerror(err)); return 1; }
	for (a = all; a; a = a->ai_next) {
		s = socket(a->ai_family, a->ai_socktype, 0);
		if (connect(s, a->ai_addr, a->ai_addrlen)) { perror("connect"); close(s); continue; }
		dprintf(s, "GET / HTTP/1.0\r\n\r\n");
		while ((n = read(s, b, sizeof b)) > 0) write(1, b, n);
		return 0;
	}
	return 1;
}
`

const goFetch = `package main

import (
	"io"
	"net/http"
	"os"
)

func main() {
	r, err := http.Get("http://" + os.Args[1] + ":" + os.Args[2])
	if err != nil {
		panic(err)
	}
	io.Copy(os.Stdout, r.Body)
}
`

const javaFetch = `import java.net.*;
public class Fetch {
	public static void main(String[] a) throws Exception {
		System.out.write(new URL("http://" + a[0] + ":" + a[1]).openStream().readAllBytes());
		System.out.flush();
	}
}
`

// nodeFetch looks a name up by getaddrinfo, as http does, and by c-ares.
const nodeFetch = `const [name, port] = process.argv.slice(1);
require('http').get({host: name, port, agent: false}, r => r.pipe(process.stdout));
require('dns').resolve4(name, (err, a) => console.log(err ? err.code : 'c-ares found ' + a.length));`

const pythonFetch = `import sys, urllib.request
print(urllib.request.urlopen("http://%s:%s" % tuple(sys.argv[1:])).read().decode())`

// fetcher is a way to resolve names. Its program is called with a name and a port, and prints what the web server there says.
type fetcher struct {
	name  string
	needs []string
	argv  func(t *testing.T, dir string) []string
}

// built runs a compiler with a source file, and returns the program that it makes.
func built(t *testing.T, dir, source, text string, compiler ...string) []string {
	t.Helper()
	file, bin := filepath.Join(dir, source), filepath.Join(dir, "fetch")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(compiler[0], append(compiler[1:], "-o", bin, file)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot compile: %v\n%s", err, out)
	}
	return []string{bin}
}

func literally(argv ...string) func(*testing.T, string) []string {
	return func(*testing.T, string) []string { return argv }
}

var fetchers = []fetcher{
	{"getent", []string{"getent"}, literally("sh", "-c", `getent hosts "$0" >/dev/null && echo served`)},
	{"glibc", []string{"gcc"}, func(t *testing.T, dir string) []string { return built(t, dir, "fetch.c", cFetch, "gcc") }},
	{"musl", []string{"musl-gcc"}, func(t *testing.T, dir string) []string {
		return built(t, dir, "fetch.c", cFetch, "musl-gcc", "-static")
	}},
	{"Go", []string{"go"}, func(t *testing.T, dir string) []string {
		return built(t, dir, "fetch.go", goFetch, "env", "CGO_ENABLED=0", "go", "build")
	}},
	{"Go with cgo", []string{"go", "gcc"}, func(t *testing.T, dir string) []string {
		return built(t, dir, "fetch.go", goFetch, "env", "CGO_ENABLED=1", "go", "build", "-tags", "netcgo")
	}},
	{"aria2", []string{"aria2c"}, literally("sh", "-c",
		`aria2c -q --no-conf --allow-overwrite=true --async-dns=true -d "${TMPDIR:-/tmp}" -o fetched.$$ "http://$0:$1" &&
			cat "${TMPDIR:-/tmp}/fetched.$$" && rm "${TMPDIR:-/tmp}/fetched.$$"`)},
	{"curl", []string{"curl"}, literally("sh", "-c", `curl -sS -m 20 "http://$0:$1"`)},
	{"Python", []string{"python3"}, literally("python3", "-c", pythonFetch)},
	{"Node", []string{"node"}, literally("node", "-e", nodeFetch, "--")},
	{"Java", []string{"java", "javac"}, func(t *testing.T, dir string) []string {
		if err := os.WriteFile(filepath.Join(dir, "Fetch.java"), []byte(javaFetch), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("javac", "-d", dir, filepath.Join(dir, "Fetch.java")).CombinedOutput(); err != nil {
			t.Fatalf("cannot compile: %v\n%s", err, out)
		}
		return []string{"java", "-cp", dir, "Fetch"}
	}},
}

// nscd is where every program of glibc asks for names first. It counts the programs in the network namespace of the test, and
// those in another one. It drops them, so that they go on to nsswitch.conf.
func nscd(t *testing.T) (here, elsewhere *atomic.Int32) {
	t.Helper()
	const dir = "/run/nscd"
	if os.Geteuid() != 0 {
		t.Skip("needs root for a socket in " + dir)
	}
	if err := os.Mkdir(dir, 0o755); err == nil {
		t.Cleanup(func() { _ = os.Remove(dir) })
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Skipf("cannot mount over %s: %v", dir, err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	l, err := net.Listen("unix", dir+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	here, elsewhere = new(atomic.Int32), new(atomic.Int32)
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if theirs := peerNamespace(c.(*net.UnixConn)); theirs == own {
				here.Add(1)
			} else {
				elsewhere.Add(1)
			}
			c.Close()
		}
	}()
	return here, elsewhere
}

// peerNamespace is the network namespace of the program at the other end, which waits for our answer; "": it is gone.
func peerNamespace(c *net.UnixConn) (ns string) {
	raw, err := c.SyscallConn()
	if err != nil {
		return ""
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			ns, _ = os.Readlink(fmt.Sprintf("/proc/%d/ns/net", cred.Pid))
		}
	})
	return ns
}

// TestRuntimes: each library that resolves names finds a name under `viasocks run`, by real answers and by addresses that stand
// for names, and asks no nscd of the host.
func TestRuntimes(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "dnsmasq", "microsocks")
	// Its answer for IPv6 must be empty: REFUSED or NXDOMAIN, which dnsmasq gives with --address, ends musl's search.
	dnsmasq(t, "--host-record=web.example,"+world4, "--local=/example/")
	serve(t, "127.0.0.1:1089", "microsocks", "-i", "127.0.0.1", "-p", "1089")
	l, at := listenTCP(t, world4)
	s := &http.Server{ReadHeaderTimeout: testkit.Patience,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte("served"))
		})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	here, asked := nscd(t)
	if _, err := exec.LookPath("getent"); err == nil {
		_ = exec.Command("getent", "hosts", "web.example").Run()
		if here.Load() == 0 {
			t.Error("the control: getent on the host asks no nscd")
		}
	}
	modes := map[string]string{"tcp": "tcp://" + world4 + ":53", "fake": "fake,tcp://" + world4 + ":53"}
	for _, f := range fetchers {
		t.Run(f.name, func(t *testing.T) {
			needPrograms(t, f.needs...)
			argv := append(f.argv(t, t.TempDir()), "web.example", fmt.Sprint(at.Port()))
			for mode, dns := range modes {
				start := time.Now()
				r := run(t, []string{"--proxy", "socks5://127.0.0.1:1089", "--dns", dns}, argv...)
				if !strings.Contains(r.out, "served") || r.exit != 0 ||
					f.name == "Node" && !strings.Contains(r.out, "c-ares found 1") {
					t.Errorf("%s: exit status %d, %q\n%s", mode, r.exit, r.out, r.stderr)
				}
				t.Logf("%s: %v", mode, time.Since(start).Round(time.Millisecond))
				if n := asked.Swap(0); n != 0 {
					t.Errorf("%s: nscd was asked %d times", mode, n)
				}
			}
		})
	}
}
