package hosttest

import (
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// TestWait: `up --wait` at boot, before there is an address. The host is closed at once, says what it waits for, and stays closed
// when the network is there and the proxy is not; when the proxy comes it carries, without anybody's help.
func TestWait(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	var reached atomic.Int32
	serve(w.listen("world", ":77"), func(c net.Conn) { reached.Add(1); echo(c) })
	w.ip("host", "addr flush dev eth0\n-6 addr flush dev eth0\nroute flush table main proto boot\n")
	d := w.launch("--proxy", "socks5://"+proxy4, "--wait", "--confirm", "10m")
	waits := func(why string) {
		t.Helper()
		w.eventually(20*time.Second, "it waits: "+why, func() bool {
			out, err := w.command("status", "--json")
			return err == nil && strings.Contains(out, `"state": "waiting"`) && strings.Contains(out, why)
		})
	}
	waits("unreachable")
	if out, _ := w.command("status"); !strings.Contains(out, ": waiting, up since") ||
		!strings.Contains(out, "waiting for the proxy; the host is closed until it can be reached: cannot reach the proxy") {
		t.Errorf("status says\n%s", out)
	}
	refused := func(when string) {
		t.Helper()
		for range 3 {
			if c, err := w.dial("host", netipAddrPort("203.0.113.7", 77)); err == nil {
				c.Close()
				t.Errorf("%s: a program reaches the net", when)
			}
		}
	}
	refused("without an address")
	w.ip("host", "addr add "+host4+"/24 dev eth0\naddr add "+hostLAN4+"/24 dev eth0\nroute add default via "+router4+" dev eth0")
	waits("connection refused")
	refused("with a network, and without the proxy")
	if n := reached.Load(); n != 0 {
		t.Errorf("%d connections left past the proxy", n)
	}
	w.proxy(proxy4 + ":1080")
	d.ready()
	c, err := w.dial("host", netipAddrPort("203.0.113.7", 77))
	if err == nil {
		err = exchange(c, 5000)
	}
	if err != nil {
		t.Errorf("when the proxy is there: %v", err)
	}
	if s := ask[control.Status](w, "status"); s.State != control.Unconfirmed || s.Waiting != "" || s.ReadyAt == nil {
		t.Errorf("%+v", s)
	}
	if out, err := w.command("confirm"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
}
