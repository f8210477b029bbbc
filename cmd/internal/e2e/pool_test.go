package e2e

import (
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
)

// TestPoolOfRestartedServer: connections that --pool keeps to a real server die when the server is restarted. No connection of
// the program notices: each one is made.
func TestPoolOfRestartedServer(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	for _, name := range []string{"microsocks", "danted", "stunnel4"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed: scripts/deps.sh test", name)
		}
	}
	l, dst := listenTCP(t, world4)
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			c.Close()
		}
	}()
	cert, ca, err := sockstest.Certificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	key, err := sockstest.KeyPEM(cert)
	if err != nil {
		t.Fatal(err)
	}
	stunnel := writeFile(
		t,
		"stunnel.conf",
		"foreground = yes\npid =\n[socks]\naccept = 127.0.0.1:1092\nconnect = 127.0.0.1:1091\n"+
			"cert = "+writeFile(t, "cert", string(key)+string(ca))+"\n",
	)
	danted := writeFile(t, "danted.conf", "logoutput: stderr\ninternal: 127.0.0.1 port = 1093\nexternal: "+other4+
		"\nclientmethod: none\nsocksmethod: none\nclient pass { from: 0/0 to: 0/0 }\n"+
		"socks pass { from: 0/0 to: 0/0 log: error }\n")
	microsocks := &realServer{
		t:     t,
		name:  "microsocks",
		port:  1091,
		start: []string{"microsocks", "-i", "127.0.0.1", "-p", "1091"},
	}
	microsocks.up()
	for _, tt := range []struct {
		server *realServer
		flags  []string
	}{
		{microsocks, []string{"--proxy", "socks5://127.0.0.1:1091"}},
		{&realServer{name: "stunnel", port: 1092, start: []string{"stunnel4", stunnel}},
			[]string{"--proxy", "socks5+tls://127.0.0.1:1092", "--proxy-ca", writeFile(t, "ca", string(ca))}},
		{&realServer{name: "dante", port: 1093, start: []string{"danted", "-f", danted, "-p", filepath.Join(t.TempDir(), "pid")}},
			[]string{"--proxy", "socks5://127.0.0.1:1093"}},
	} {
		t.Run(tt.server.name, func(t *testing.T) {
			if tt.server != microsocks {
				tt.server.t = t
				tt.server.up()
			}
			a := startApp(t, append(tt.flags, "--pool", "4", "--pipeline", "auto")...)
			connects := func(when string, n int) {
				for i := range n {
					fd, took, err := a.connect(dst)
					unix.Close(fd)
					if err != nil {
						t.Errorf("%s: connection %d failed after %v: %v", when, i, took, err)
					}
				}
			}
			connects("before", 10)
			for range 3 {
				tt.server.kill()
				tt.server.up()
				connects("after a restart", 10)
			}
		})
	}
}
