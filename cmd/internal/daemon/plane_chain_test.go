package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A chain carries TCP through both proxies, refuses UDP, connects to none but the first, follows a reload of either, and is
// shown.
func TestChainCarries(t *testing.T) {
	testkit.CheckLeaks(t)
	c, write := newCarried(t)
	far := listen(t, sockstest.WithRedirectsOnly())
	far.Redirect(farTCP, serveTCP(t, func(b []byte) []byte { return b }))
	at := netip.MustParseAddrPort("198.51.100.7:1080") // nobody is there: only the near proxy knows the way
	c.proxy.Redirect(at, far.Addr())
	file := "proxy %s\nupstream far=socks5://198.51.100.7 via=proxy\nrule dst 203.0.113.0/24 via far\n"
	near := fmt.Sprintf(file, c.proxy.URL())
	args := []string{"--proxy", c.proxy.URL(), "--upstream", "far=socks5://198.51.100.7 via=proxy"}
	if err := probe(context.Background(), parse(t, args...), dialing{}); err != nil {
		t.Errorf("the chain works: %v", err)
	}
	write(near)
	c.reload("a chain")
	if err := c.dialTCP(); err != nil {
		t.Fatal(err)
	}
	if r := far.Requests(); len(r) != 1 || r[0].Dst.Port != farTCP.Port() {
		t.Errorf("the far proxy was asked %+v", r)
	}
	if r := c.proxy.Requests(); !slices.ContainsFunc(
		r,
		func(r sockstest.Request) bool { return r.Dst.IP == at.Addr() && r.Dst.Port == at.Port() },
	) {
		t.Errorf("the near proxy was asked %+v", r)
	}
	for _, e := range c.u.allowed.list() {
		if e.Addr.Addr() == at.Addr() {
			t.Errorf("our own sockets may go to %v, which only the near proxy reaches", e)
		}
	}
	refusesUDP(t, c)
	var text strings.Builder
	if err := control.WriteStatus(&text, c.u.status(), time.Now()); err != nil ||
		!strings.Contains(text.String(), "socks5://198.51.100.7:1080 via proxy") {
		t.Errorf("%v: %s", err, text.String())
	}

	// The near proxy moves: the chain, which says the same as before, must go through the new one.
	other := listen(t, sockstest.WithRedirectsOnly())
	other.Redirect(at, far.Addr())
	write(fmt.Sprintf(file, other.URL()))
	c.reload("another near proxy")
	asked := len(c.proxy.Requests())
	if err := c.dialTCP(); err != nil {
		t.Error(err)
	}
	if len(other.Requests()) != 1 || len(c.proxy.Requests()) != asked {
		t.Errorf("the new near proxy had %d requests, the old one %d more", len(other.Requests()), len(c.proxy.Requests())-asked)
	}
	other.Redirect(at, netip.MustParseAddrPort("127.0.0.1:1"))
	saysThatFarIsAbsent(t, append([]string{"--proxy", other.URL()}, args[2:]...))
	write("")
	c.reload("no chain")
	c.works("without the chain")
}

// saysThatFarIsAbsent wants the far proxy to be said to be missing, which is no error.
func saysThatFarIsAbsent(t *testing.T, args []string) {
	t.Helper()
	var log strings.Builder
	without := dialing{absent: newAbsent(slog.New(slog.NewTextHandler(&log, nil)))}
	err := probe(context.Background(), parse(t, args...), without)
	if err != nil || !strings.Contains(log.String(), "cannot reach the proxy 198.51.100.7:1080") {
		t.Errorf("the far proxy is not there: %v; the log says %q", err, log.String())
	}
}

// dialTCP has the app connect once.
func (c *carried) dialTCP() error {
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	conn, err := c.app.DialTCP(ctx, farTCP)
	if err == nil {
		conn.Close()
	}
	return err
}

// refusesUDP wants the app to hear that the port is unreachable.
func refusesUDP(t *testing.T, c *carried) {
	t.Helper()
	u, err := c.app.DialUDP(netip.AddrPort{}, farUDP)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	b := make([]byte, 9)
	for end := time.Now().Add(testkit.Patience); ; {
		_, _ = u.Write([]byte("udp"))
		u.SetReadDeadline(time.Now().Add(time.Second))
		if _, err = u.Read(b); errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(end) {
			break
		}
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("UDP: %v, want port unreachable", err)
	}
}
