package daemon

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A group starts when one of its servers works, carries TCP, UDP and names, and status shows each server.
func TestGroupCarries(t *testing.T) {
	testkit.CheckLeaks(t)
	c, write := newCarried(t)
	dead, err := sockstest.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	file := fmt.Sprintf("upstream g=%s,%s attempts=2 connect-timeout=1s\nrule via g\n", dead.URL(), c.proxy.URL())
	group := parse(t, "--upstream", strings.TrimPrefix(strings.Split(file, "\n")[0], "upstream "), "--rule", "via g")
	if err := probe(context.Background(), group, dialing{}); err != nil {
		t.Errorf("one server works: %v", err)
	}
	write(file)
	c.reload("a group")
	for _, u := range c.u.status().Upstreams {
		if u.Name == "g" && u.UDP != control.UpstreamNotTried {
			t.Errorf("UDP of a group that nobody has used: %q", u.UDP)
		}
	}
	for i := range 3 {
		c.works(fmt.Sprintf("by a group, %d", i))
	}
	for _, u := range c.u.status().Upstreams {
		if u.Name != "g" {
			continue
		}
		if len(u.Servers) != 2 || u.Servers[0].State != "down" || u.Servers[0].Why == "" || u.Servers[1].State != "ok" ||
			u.TCP != "ok" || u.UDP != "ok" {
			t.Errorf("%+v", u)
		}
		var b strings.Builder
		if err := control.WriteStatus(&b, c.u.status(), time.Now()); err != nil || !strings.Contains(b.String(), dead.URL()) {
			t.Errorf("%v: %s", err, b.String())
		}
		write("")
		c.reload("no group")
		c.works("without the group")
		return
	}
	t.Error("status has no group")
}

// OpenSSH -D ends each request for a target that refuses. Status shows the server up: it is the target that refuses.
func TestRefusedTargetsAreNoFault(t *testing.T) {
	testkit.CheckLeaks(t)
	c, write := newCarried(t)
	other := listen(t, sockstest.WithRedirectsOnly())
	write(fmt.Sprintf("upstream g=%s,%s\nrule via g\n", c.proxy.URL(), other.URL()))
	c.reload("a group")
	c.works("before")
	c.proxy.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Dst.IP == farTCP.Addr() {
			return sockstest.Fault{}
		}
		return sockstest.EarlyClose()
	})
	for i := range 7 { // eight in a row, and no success between them, would be the server's fault
		ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
		conn, err := c.app.DialTCP(ctx, netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(100 + i)}), 80))
		cancel()
		if err == nil {
			conn.Close()
			t.Fatal("a connection was made that the first server refused")
		}
	}
	if n := len(other.Requests()); n > 0 {
		t.Errorf("the other server was asked %d times", n)
	}
	for _, u := range c.u.status().Upstreams {
		if u.Name == "g" && (u.TCP != "ok" || u.Servers[0].State != "ok" || u.Servers[0].Why != "") {
			t.Errorf("status says %+v", u)
		}
	}
}
