package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// noDNS has dante refuse whatever goes to port 53.
const noDNS = "socks block { from: 0/0 to: 0/0 port = 53 }"

// zooServer is a server that scripts/zoo.sh has built, or "".
func zooServer(name string) string {
	cache, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	if found, _ := filepath.Glob(filepath.Join(cache, "viasocks-zoo", name+"-v*")); len(found) > 0 {
		return found[len(found)-1]
	}
	return ""
}

// TestNamesInUDP: dig asks servers of DNS that it knows by name, at another port than 53, and takes answers only from the address
// that it asked. No resolver can be reached: the names travel in the headers of datagrams. Real servers answer from the name or
// from its address; viasocks comes to know that they take names, and keeps the association.
func TestNamesInUDP(t *testing.T) {
	needPrograms(t, "dnsmasq", "dig")
	dnsmasq(t, "--address=/far.example/"+world4, "--address=/near.example/"+world4)
	for _, port := range []string{"5300", "5301"} {
		serve(t, world4+":"+port, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--no-resolv",
			"--no-hosts", "--bind-interfaces", "--listen-address="+world4, "--port="+port, "--pid-file=",
			"--address=/question.example/203.0.113.77")
	}
	for _, name := range []string{"dante", "ss-local", "v2ray", "trojan", "sing-box", "xray", "tailscale"} {
		t.Run(name, func(t *testing.T) {
			const at = "127.0.0.1:1081"
			startReal(t, name, at)
			r := run(t, []string{"--proxy", "socks5://" + at, "--dns", noResolver, "--log-level", "debug"}, "sh", "-c",
				`ask() { dig +short +tries=1 +time=20 @$1 -p $2 question.example; }
				ask far.example 5300; ask near.example 5301; ask far.example 5300`)
			if got := strings.Fields(r.out); len(got) != 3 || got[0] != "203.0.113.77" || got[1] != got[0] || got[2] != got[0] {
				t.Errorf("dig got %q\n%s", got, r.stderr)
			}
			if !strings.Contains(r.stderr, "takes=yes") {
				t.Errorf("it is not known that the server takes names:\n%s", r.stderr)
			}
			if strings.Contains(r.stderr, "association is made again") {
				t.Errorf("an association ended:\n%s", r.stderr)
			}
		})
	}
}

// startReal starts a real SOCKS server with UDP.
func startReal(t *testing.T, name, at string) {
	t.Helper()
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ray := `{"log": {"loglevel": "warning"}, "outbounds": [{"protocol": "freedom"}],
		"inbounds": [{"listen": "127.0.0.1", "port": 1081,
		"protocol": "socks", "settings": {"auth": "noauth", "udp": true, "ip": "127.0.0.1"}}]}`
	switch name {
	case "dante":
		needPrograms(t, "danted")
		dante(t, at, noDNS)
	case "ss-local":
		needPrograms(t, "ss-local", "ss-server")
		serve(t, "127.0.0.1:8388", "ss-server", "-u", "-s", "127.0.0.1", "-p", "8388", "-k", "e2e", "-m", "aes-256-gcm")
		serve(t, at, "ss-local", "-u", "-s", "127.0.0.1", "-p", "8388", "-k", "e2e", "-m", "aes-256-gcm",
			"-b", "127.0.0.1", "-l", "1081")
	case "v2ray":
		needPrograms(t, "v2ray")
		serve(t, at, "v2ray", "-config", file("ray.json", ray))
	case "trojan":
		needPrograms(t, "trojan", "openssl")
		startTrojan(t, at, file)
	default:
		bin := zooServer(name)
		if bin == "" {
			t.Skipf("%s was not built by scripts/zoo.sh", name)
		}
		switch name {
		case "xray":
			serve(t, at, bin, "run", "-config", file("ray.json", ray))
		case "tailscale":
			serve(t, at, bin, at)
		case "sing-box":
			serve(t, at, bin, "run", "-c", file("sing-box.json", `{"log": {"level": "warn"},
				"outbounds": [{"type": "direct", "tag": "direct"}],
				"dns": {"servers": [{"type": "local", "tag": "local"}]}, "route": {"default_domain_resolver": "local"},
				"inbounds": [{"type": "socks", "listen": "127.0.0.1", "listen_port": 1081}]}`))
		}
	}
}

// startTrojan starts both halves of a trojan.
func startTrojan(t *testing.T, at string, file func(name, text string) string) {
	t.Helper()
	_, port, _ := net.SplitHostPort(at)
	key := file("key", "")
	cert := file("cert", "")
	if out, err := exec.Command("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
		"-days", "2", "-subj", "/CN=proxy.example", "-keyout", key, "-out", cert).CombinedOutput(); err != nil {
		t.Fatalf("openssl: %v: %s", err, out)
	}
	serve(t, "127.0.0.1:8443", "trojan", "-c", file("server.json", fmt.Sprintf(`{"run_type": "server", "local_addr": "127.0.0.1",
		"local_port": 8443, "remote_addr": "127.0.0.1", "remote_port": 80, "password": ["e2e"], "log_level": 2,
		"ssl": {"cert": %q, "key": %q}}`, cert, key)))
	serve(t, at, "trojan", "-c", file("client.json", fmt.Sprintf(`{"run_type": "client", "local_addr": "127.0.0.1",
		"local_port": %s,
		"remote_addr": "127.0.0.1", "remote_port": 8443, "password": ["e2e"], "log_level": 2,
		"ssl": {"verify": false, "verify_hostname": false, "cert": "", "sni": "proxy.example"}}`, port)))
}
