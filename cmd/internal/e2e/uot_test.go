package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/socks"
)

// singBox starts the sing-box that scripts/zoo.sh builds, with an inbound of this type, and gives its endpoint.
func singBox(t *testing.T, inbound string) string {
	t.Helper()
	needWorld(t)
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("cannot look for sing-box: %v", err)
	}
	bin := filepath.Join(cache, "viasocks-zoo", "sing-box-v1.14.1")
	if _, err := os.Stat(bin); err != nil {
		t.Skipf("sing-box 1.14.1 is not there (scripts/zoo.sh sing-box builds it): %v", err)
	}
	at := "127.0.0.1:1088"
	conf := filepath.Join(t.TempDir(), "sing-box.json")
	text := fmt.Sprintf(`{"log": {"level": "debug"},
		"inbounds": [{"type": %q, "listen": "127.0.0.1", "listen_port": 1088}],
		"outbounds": [{"type": "direct", "tag": "direct"}]}`, inbound)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	serve(t, at, bin, "run", "-c", conf)
	return at
}

// TestUDPOverTCP: a real sing-box carries datagrams over TCP, asked by SOCKS5 and by HTTP CONNECT: the mapping is
// endpoint-independent, and sizes are kept up to sing-box's limit.
func TestUDPOverTCP(t *testing.T) {
	for _, way := range []struct{ inbound, url string }{{"socks", "socks5://"}, {"mixed", "socks4a://"}, {"http", "http://"}} {
		t.Run(way.url, func(t *testing.T) {
			at := singBox(t, way.inbound)
			a := startApp(t, "--proxy", way.url+at+"?udp=over-tcp")
			eachFamily(t, func(t *testing.T, host string) {
				t.Run("mapping and filtering", func(t *testing.T) { testMapping(t, a, host) })
				t.Run("sizes", func(t *testing.T) { testSizesOverTCP(t, a, host) })
				t.Run("burst", func(t *testing.T) { testBurst(t, a, host) })
			})
			if log := a.log.String(); strings.Contains(log, "does not work") {
				t.Errorf("viasocks said:\n%s", log)
			}
		})
	}
}

func testSizesOverTCP(t *testing.T, a *app, host string) {
	app := a.udp(host == world6)
	far, addr := farUDP(t, host)
	var port uint16
	for _, size := range []int{0, 1, 1452, 1472, 1473, 9000, socks.MaxUoTPayload - 1, socks.MaxUoTPayload} {
		payload := string(bytes.Repeat([]byte{byte(size + 1)}, size))
		send(t, app, addr, payload)
		got, mapped := recv(t, far)
		if got != payload || port != 0 && mapped.Port() != port {
			t.Fatalf("%d bytes up arrived as %d, from port %d, after %d", size, len(got), mapped.Port(), port)
		}
		port = mapped.Port()
		send(t, far, mapped, payload)
		if got, from := recv(t, app); got != payload || from != addr {
			t.Fatalf("%d bytes down arrived as %d from %v", size, len(got), from)
		}
	}
	send(t, app, addr, string(make([]byte, socks.MaxUoTPayload+1))) // dropped, and nothing else is hurt
	send(t, app, addr, "after")
	if got, mapped := recv(t, far); got != "after" || mapped.Port() != port {
		t.Errorf("after a datagram over the limit %d bytes arrived from port %d, before from %d", len(got), mapped.Port(), port)
	}
}
