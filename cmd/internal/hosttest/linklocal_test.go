package hosttest

import (
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
)

// TestLinkLocalProxy: a proxy at a link-local address is reached by the device that its zone names, whether the address stands in
// the URL or is what a name stands for: TCP and UDP are carried, also where the LAN is refused, and the status shows the zone.
func TestLinkLocalProxy(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	serve(w.listen("world", ":77"), echo)
	answers := w.packets("world", "203.0.113.9:79")
	go func() {
		b := make([]byte, 2048)
		for n, from, err := answers.ReadFrom(b); err == nil; n, from, err = answers.ReadFrom(b) {
			_, _ = answers.WriteTo(b[:n], from)
		}
	}()
	s, err := sockstest.Listen("tcp6", "["+routerLL+"%host0]:1080", sockstest.WithNetns("/run/netns/router"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := setProxyName(routerLL + "%eth0"); err != nil {
		t.Fatal(err)
	}
	defer setProxyName(proxy4)
	for _, tt := range []struct{ url, shown string }{
		{"socks5://[" + routerLL + "%25eth0]:1080", "[" + routerLL + "%25eth0]:1080"},
		{"socks5://" + proxyName, proxyName + ":1080"},
	} {
		d := w.up("--proxy", tt.url, "--lan", "refuse")
		c, err := w.dial("host", netipAddrPort("203.0.113.7", 77))
		if err == nil {
			err = exchange(c, 5000)
		}
		if err != nil {
			t.Errorf("%s: TCP: %v", tt.url, err)
		}
		u := w.packets("host", "0.0.0.0:0")
		b := make([]byte, 100)
		w.eventually(20*time.Second, tt.url+": UDP is answered", func() bool {
			_, _ = u.WriteToUDPAddrPort([]byte("hello"), netipAddrPort("203.0.113.9", 79))
			_ = u.SetReadDeadline(time.Now().Add(time.Second))
			n, _, err := u.ReadFrom(b)
			return err == nil && string(b[:n]) == "hello"
		})
		up := ask[control.Status](w, "status").Upstreams[0]
		if !strings.HasSuffix(up.URL, tt.shown) || len(up.Addresses) < 2 ||
			!strings.HasPrefix(up.Addresses[0], "["+routerLL+"%eth0]:1080") {
			t.Errorf("%s: the status shows %+v", tt.url, up)
		}
		if err := d.stop(); err != nil {
			t.Errorf("%s: %v", tt.url, err)
		}
	}
}
