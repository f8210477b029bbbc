package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// noResolver is where nobody answers, so that a test sees what needs no resolver.
const noResolver = "fake,tcp://" + other4 + ":9"

// dante serves SOCKS5 with UDP at an endpoint, and resolves names by the host's resolver.
func dante(t *testing.T, at string, rules ...string) {
	t.Helper()
	dir := t.TempDir()
	host, port, _ := strings.Cut(at, ":")
	conf := fmt.Sprintf(`logoutput: stderr
internal: %s port = %s
external: %s
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: root
udp.connectdst: no
client pass { from: 0/0 to: 0/0 }
%s
socks pass { from: 0/0 to: 0/0 }
`, host, port, world4, strings.Join(rules, "\n"))
	file := filepath.Join(dir, "conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	serve(t, at, "danted", "-f", file, "-p", filepath.Join(dir, "pid"))
}

// sshD serves SOCKS5 at an endpoint by OpenSSH's dynamic forwarding, through an sshd on this host.
func sshD(t *testing.T, at string) {
	t.Helper()
	dir := t.TempDir()
	_ = os.MkdirAll("/run/sshd", 0o755) // sshd's own, which may be there
	for _, name := range []string{"host", "key"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f",
			filepath.Join(dir, name)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v\n%s", err, out)
		}
	}
	serve(t, "127.0.0.1:2222", "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", filepath.Join(dir, "host"), "-p", "2222",
		"-o", "ListenAddress=127.0.0.1", "-o", "UsePAM=no", "-o", "PidFile=none", "-o", "StrictModes=no",
		"-o", "AuthorizedKeysFile="+filepath.Join(dir, "key.pub"), "-o", "PermitRootLogin=yes")
	serve(
		t,
		at,
		"ssh",
		"-F",
		"/dev/null",
		"-N",
		"-D",
		at,
		"-p",
		"2222",
		"-i",
		filepath.Join(dir, "key"),
		"-o",
		"IdentitiesOnly=yes",
		"-o",
		"BatchMode=yes",
		"-o",
		"StrictHostKeyChecking=no",
		"-o",
		"UserKnownHostsFile=/dev/null",
		"-o",
		"LogLevel=ERROR",
		"root@127.0.0.1",
	)
}

// TestFakeNames: with --dns fake curl reaches a name that only the proxy can resolve, whatever the proxy: no resolver answers.
// A name that does not exist is told at once, and one that a rule sends direct is resolved on this host.
func TestFakeNames(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "nginx", "dnsmasq", "curl", "danted", "microsocks", "ssh", "/usr/sbin/sshd", "getent", "dig")
	nginx(t, world4+":8080")
	dnsmasq(t, "--address=/web.example/"+world4)
	// microsocks takes no port on which an ended connection waits (TIME_WAIT): each server has its own.
	for name, start := range map[string]func() (at string){
		"dante": func() string { dante(t, "127.0.0.1:1081"); return "127.0.0.1:1081" },
		"microsocks": func() string {
			serve(t, "127.0.0.1:1082", "microsocks", "-i", "127.0.0.1", "-p", "1082")
			return "127.0.0.1:1082"
		},
		"ssh -D": func() string { sshD(t, "127.0.0.1:1083"); return "127.0.0.1:1083" },
	} {
		t.Run(strings.ReplaceAll(name, " ", ""), func(t *testing.T) {
			outer := t
			at := start()
			flags := []string{"--proxy", "socks5://" + at, "--dns", noResolver}
			got := strings.Split(
				curl(outer, flags, "http://web.example:8080", "http://deep.web.example:8080", "http://no.example:8080"),
				"\n",
			)
			if len(got) != 3 || got[0] != served || got[1] != served || got[2] == served {
				t.Errorf("curl by name: %q", got)
			}
			direct := append(flags, "--rule", "name web.example direct", "--rule", "reject")
			if got := curl(outer, direct, "http://web.example:8080"); got != served {
				t.Errorf("curl by a name that a rule sends direct: %q", got)
			}
		})
	}
}

// TestFakeAnswers: what programs see of fake addresses.
func TestFakeAnswers(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "getent", "dig")
	proxy := listenSOCKS(t)
	flags := []string{"--proxy", proxy.URL(), "--dns", noResolver, "--dns-pool", "198.19.0.0/16"}
	fake := netip.MustParsePrefix("198.19.0.0/16")
	r := run(
		t,
		flags,
		"sh",
		"-c",
		"getent ahostsv4 www.example.com | head -1 | cut -d' ' -f1; dig +short +notcp www.example.com; "+
			"dig +tcp +short www.example.com; getent hosts $(dig +short www.example.com); dig +short www.example.com AAAA",
	)
	lines := strings.Split(strings.TrimSpace(r.out), "\n")
	if len(lines) != 5 {
		t.Fatalf("%q, %s", lines, r.stderr)
	}
	for i, l := range lines[:3] {
		if a, err := netip.ParseAddr(l); err != nil || !fake.Contains(a) || l != lines[0] {
			t.Errorf("answer %d is %q", i, l)
		}
	}
	if f := strings.Fields(lines[3]); len(f) != 2 || f[0] != lines[0] || f[1] != "www.example.com" {
		t.Errorf("the reverse look-up says %q", lines[3])
	}
	if a, err := netip.ParseAddr(lines[4]); err != nil || !a.Is6() {
		t.Errorf("AAAA: %q", lines[4])
	}
	if r := run(t, append(flags, "--ipv6", "off"), "dig", "+short", "www.example.com", "AAAA"); r.out != "" {
		t.Errorf("with --ipv6 off AAAA is %q", r.out)
	}
	// RFC 7686: a name of .onion is nothing to anybody but a Tor.
	if r := run(t, flags, "dig", "www.onion"); !strings.Contains(r.out, "NXDOMAIN") {
		t.Errorf(".onion without a Tor: %s", r.out)
	}
	tor := append([]string{"--proxy", proxy.URL() + "?tor"}, flags[2:]...)
	if a, err := netip.ParseAddr(strings.TrimSpace(run(t, tor, "dig", "+short", "www.onion").out)); err != nil ||
		!fake.Contains(a) {
		t.Errorf(".onion by a Tor: %v, %v", a, err)
	}
	testkit.Tries(t, "MX without a resolver", func() error {
		r := run(t, flags, "dig", "+tries=1", "+time=10", "www.example.com", "MX")
		if !strings.Contains(r.out, "SERVFAIL") || r.took > 8*time.Second {
			return fmt.Errorf("after %v: %s", r.took, r.out)
		}
		return nil
	})
	for _, q := range proxy.Requests() {
		if q.Dst.String() != net.JoinHostPort(other4, "9") {
			t.Errorf("the proxy was asked for %v", q.Dst)
		}
	}
}
