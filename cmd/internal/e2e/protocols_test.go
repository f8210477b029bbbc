package e2e

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// fileServer serves 3 MiB of noise in the world, and gives its endpoint and the hash of it.
func fileServer(t *testing.T) (at, hash string) {
	t.Helper()
	data := make([]byte, 3<<20)
	r := rand.NewChaCha8([32]byte{7})
	_, _ = r.Read(data) // never fails
	l, addr := listenTCP(t, world4)
	s := &http.Server{ReadHeaderTimeout: testkit.Patience,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(data)
		})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return addr.String(), fmt.Sprintf("%x", sha256.Sum256(data))
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// protocolsCases are the cases of TestProtocols.
var protocolsCases = []struct {
	name  string
	needs []string
	start func(t *testing.T) (flags []string)
}{
	{"socks4a", []string{"danted"}, func(t *testing.T) []string {
		serve(t, "127.0.0.1:1085", "danted", "-p", filepath.Join(t.TempDir(), "pid"), "-f", writeFile(t, "conf", `logoutput: stderr
internal: 127.0.0.1 port = 1085
external: `+world4+`
socksmethod: none
clientmethod: none
user.privileged: root
user.unprivileged: root
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
`))
		return []string{"--proxy", "socks4a://127.0.0.1:1085"}
	}},
	{"http", []string{"tinyproxy"}, func(t *testing.T) []string {
		serve(t, "127.0.0.1:8888", "tinyproxy", "-d", "-c", writeFile(t, "conf", "Port 8888\nListen 127.0.0.1\nTimeout 60\n"))
		return []string{"--proxy", "http://127.0.0.1:8888"}
	}},
	{"socks5+tls", []string{"stunnel4", "microsocks"}, func(t *testing.T) []string {
		cert, pem, err := sockstest.Certificate("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		key, err := sockstest.KeyPEM(cert)
		if err != nil {
			t.Fatal(err)
		}
		serve(t, "127.0.0.1:1086", "microsocks", "-i", "127.0.0.1", "-p", "1086")
		serve(t, "127.0.0.1:1443", "stunnel4",
			writeFile(t, "conf", "foreground = yes\npid =\n[socks]\naccept = 127.0.0.1:1443\n"+
				"connect = 127.0.0.1:1086\ncert = "+writeFile(t, "cert", string(key)+string(pem))+"\n"))
		return []string{"--proxy", "socks5+tls://127.0.0.1:1443", "--proxy-ca", writeFile(t, "ca", string(pem))}
	}},
	{"socks5+unix", []string{"socat", "microsocks"}, func(t *testing.T) []string {
		path := filepath.Join(t.TempDir(), "s")
		serve(t, "127.0.0.1:1087", "microsocks", "-i", "127.0.0.1", "-p", "1087")
		serve(t, path, "socat", "UNIX-LISTEN:"+path+",fork", "TCP:127.0.0.1:1087")
		return []string{"--proxy", "socks5+unix://" + path}
	}},
}

// TestProtocols: through real servers of each protocol a program fetches a file whole, and sees ECONNREFUSED for a port where
// nobody listens: dante speaks SOCKS4, tinyproxy HTTP, and microsocks SOCKS5, inside the TLS of stunnel and behind a unix
// socket of socat.
func TestProtocols(t *testing.T) {
	for _, way := range protocolsCases {
		t.Run(way.name, func(t *testing.T) {
			needPrograms(t, append(way.needs, "curl", "bash", "sha256sum")...)
			at, hash := fileServer(t)
			l, closed := listenTCP(t, world4)
			l.Close()
			flags := way.start(t)
			start := time.Now()
			r := run(t, flags, "bash", "-c", fmt.Sprintf(`curl -sS -m 20 http://%s/ | sha256sum
				LC_ALL=C; exec 3<>/dev/tcp/%s/%d`, at, world4, closed.Port()))
			if !strings.HasPrefix(r.out, hash+" ") {
				t.Errorf("the file is not whole: %q, want %s", r.out, hash)
			}
			if r.exit != 1 || !strings.Contains(r.stderr, "Connection refused") {
				t.Errorf("a port where nobody listens: exit status %d", r.exit)
			}
			if took := time.Since(start); t.Failed() || took > testkit.Patience {
				t.Errorf("it took %v; standard error:\n%s", took, r.stderr)
			}
		})
	}
}
