package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
)

// unbound answers on port 53 of the world by UDP and TCP, on port 853 by TLS and on port 443 by HTTPS, and stands in the host's
// resolv.conf. data is in the form of its local-data option. It gives the file with the certificate.
func unbound(t *testing.T, data ...string) (certificate string) {
	t.Helper()
	cert, pem, err := sockstest.Certificate("dns.example")
	if err != nil {
		t.Fatal(err)
	}
	key, err := sockstest.KeyPEM(cert)
	if err != nil {
		t.Fatal(err)
	}
	certificate = writeFile(t, "cert.pem", string(pem))
	conf := fmt.Sprintf(`server:
	interface: %s
	interface: %[1]s@853
	interface: %[1]s@443
	tls-service-pem: %s
	tls-service-key: %s
	access-control: 0.0.0.0/0 allow
	username: ""
	chroot: ""
	pidfile: ""
	use-syslog: no
	do-daemonize: no
	local-zone: "." static
`, world4, certificate, writeFile(t, "key.pem", string(key)))
	for _, d := range data {
		conf += "\tlocal-data: '" + d + "'\n"
	}
	conf += "remote-control:\n\tcontrol-enable: no\n"
	serve(t, world4+":53", "unbound", "-d", "-c", writeFile(t, "unbound.conf", conf))
	useResolver(t, world4)
	return certificate
}

// useResolver puts a resolv.conf in place of the host's, in the test's mount namespace.
func useResolver(t *testing.T, address string) {
	t.Helper()
	target, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		t.Skipf("cannot put another resolv.conf in place: %v", err)
	}
	own := writeFile(t, "resolv.conf", "nameserver "+address+"\n")
	if err := os.Chmod(own, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(own, target, "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("cannot put another resolv.conf in place: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(target, 0) })
}

const muslAddresses = `
#include <netdb.h>
#include <stdio.h>
#include <arpa/inet.h>
int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *all, *a;
	char text[64];
	int err = getaddrinfo(argv[1], "80", &hints, &all);
	if (err) { puts(gai_strerror(err)); return 1; }
	for (a = all; a; a = a->ai_next)
		puts(inet_ntop(AF_INET, &((struct sockaddr_in *)a->ai_addr)->sin_addr, text, sizeof text));
	return 0;
}
`

// asking is what programs of others say about names. Each line begins with who asked.
const asking = `
musl=$1 cert=$2 dir=$3
say() { echo "$1: $(shift; "$@" 2>&1 | tr '\n' ' ')"; }
for n in +notcp +tcp; do
	say dig$n dig $n +short +tries=1 +time=20 web.example
	say kdig$n kdig $n +short +retry=0 +time=20 web.example
done
say kdig+tls kdig +tls-ca="$cert" +tls-hostname=dns.example +short +retry=0 +time=20 @203.0.113.1 web.example
say dig-mx dig +short +tries=1 +time=20 web.example MX
say dig-txt dig +short +tries=1 +time=20 +noedns +ignore many.example TXT
say dig-none dig +tries=1 +time=20 +noall +comments none.example MX
say getent getent ahostsv4 web.example
say musl "$musl" web.example
say aria2 aria2c -q --no-conf -d "$dir" --connect-timeout=10 --max-tries=1 http://web.example:8080/index.html
say file cat "$dir/index.html"
`

// TestNamesOfRealPrograms: programs of others ask for names through servers of others, with and without UDP, in fake mode and by
// TCP: dig, kdig by UDP, TCP and TLS, glibc, a static program of musl, and c-ares in aria2.
func TestNamesOfRealPrograms(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(
		t,
		"nginx",
		"unbound",
		"danted",
		"microsocks",
		"ssh",
		"/usr/sbin/sshd",
		"dig",
		"kdig",
		"getent",
		"musl-gcc",
		"aria2c",
	)
	nginx(t, world4+":8080")
	certificate := unbound(t, "web.example. 60 A "+world4, "web.example. 60 MX 10 mail.example.",
		`many.example. 60 TXT "`+strings.Repeat("a", 250)+`"`, `many.example. 60 TXT "`+strings.Repeat("b", 250)+`"`,
		`many.example. 60 TXT "`+strings.Repeat("c", 250)+`"`)
	musl := filepath.Join(t.TempDir(), "resolve")
	cc := exec.Command("musl-gcc", "-static", "-o", musl, "-x", "c", "-")
	cc.Stdin = strings.NewReader(muslAddresses)
	if out, err := cc.CombinedOutput(); err != nil {
		t.Fatalf("cannot compile: %v\n%s", err, out)
	}
	const at = "127.0.0.1:1081"
	for name, start := range map[string]func(t *testing.T){
		"dante":      func(t *testing.T) { dante(t, at) },
		"microsocks": func(t *testing.T) { serve(t, at, "microsocks", "-i", "127.0.0.1", "-p", "1081") },
		"ssh":        func(t *testing.T) { sshD(t, at) },
	} {
		t.Run(name, func(t *testing.T) {
			start(t)
			for _, mode := range []string{"fake,tcp://" + world4, "tcp://" + world4} {
				flags := []string{"--proxy", "socks5://" + at, "--dns", mode, "--log-level", "error"}
				r := run(t, flags, "bash", "-c", asking, "asking", musl, certificate, t.TempDir())
				checkAsking(t, mode, r)
			}
		})
	}
}

func checkAsking(t *testing.T, mode string, r ran) {
	t.Helper()
	isFake := strings.HasPrefix(mode, "fake")
	said := map[string]string{}
	for line := range strings.Lines(r.out) {
		who, what, _ := strings.Cut(strings.TrimSpace(line), ": ")
		said[who] = strings.TrimSpace(what)
	}
	first := said["dig+notcp"]
	for _, who := range []string{"dig+notcp", "dig+tcp", "kdig+notcp", "kdig+tcp", "getent", "musl"} {
		got, _, _ := strings.Cut(said[who], " ")
		a, err := netip.ParseAddr(got)
		if err != nil || isFake != flow.Pool4.Contains(a) || !isFake && got != world4 || got != first && got != "" && isFake {
			t.Errorf("%s: %s says %q", mode, who, said[who])
		}
	}
	for who, want := range map[string]string{
		"kdig+tls": world4, // which viasocks cannot read, and so the answer is the true one
		"dig-mx":   "10 mail.example.",
		"aria2":    "",
		"file":     "served",
	} {
		if said[who] != want {
			t.Errorf("%s: %s says %q, want %q", mode, who, said[who], want)
		}
	}
	if !strings.Contains(said["dig-none"], "NXDOMAIN") {
		t.Errorf("%s: a name that does not exist: %s", mode, said["dig-none"])
	}
	if got := strings.Fields(said["dig-txt"]); len(got) != 1 || len(got[0]) != 252 {
		t.Errorf("%s: one of three records fits into 512 bytes, and dig shows %q", mode, got)
	}
	if t.Failed() {
		t.Logf("%s, after %v:\n%s%s", mode, r.took, r.out, r.stderr)
	}
}
