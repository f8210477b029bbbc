package daemon

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
)

// A group starts when one of its servers works, carries TCP, UDP and names, and status shows each server.
func TestGroupCarries(t *testing.T) {
	noLeaks(t)
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
	for i := range 3 {
		c.works(fmt.Sprintf("by a group, %d", i))
	}
	for _, u := range c.u.status().Upstreams {
		if u.Name != "g" {
			continue
		}
		if len(u.Servers) != 2 || u.Servers[0].State != "down" || u.Servers[0].Why == "" || u.Servers[1].State != "ok" || u.TCP != "ok" {
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
