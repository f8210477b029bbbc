package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/stacktest"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

func parse(t *testing.T, args ...string) *config.Config {
	t.Helper()
	c, err := config.Parse(config.Check, args, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// overMemory is a data plane over a TUN in memory, the app at its other end, and a proxy that reaches far as farTCP.
func overMemory(t *testing.T, far netip.AddrPort, sockets flow.Sockets, args ...string) (
	s *sockstest.Server, app *stacktest.App, p *plane) {
	t.Helper()
	s = listen(t, sockstest.WithRedirectsOnly())
	s.Redirect(farTCP, far)
	ours, theirs := tuntest.Pipe(1500, tun.VnetHdr|tun.TSO|tun.USO)
	app, err := stacktest.New(theirs, netip.MustParseAddr("198.18.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { app.Close() })
	with := parse(t, append([]string{"--proxy", s.URL()}, args...)...)
	if p, err = newPlane(with, ours, sockets, dialing{}, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	p.start()
	return s, app, p
}

// The data plane over a TUN in memory: an app connects through it, and after the stop nothing is left.
func TestPlane(t *testing.T) {
	testkit.CheckLeaks(t)
	_, app, p := overMemory(t, serveTCP(t, func(b []byte) []byte { return b }), nil)
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	c, err := app.DialTCP(ctx, farTCP)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	// The app sees a reset before the host would be steered back.
	between := false
	stop(p, func() {
		between = true
		c.SetReadDeadline(time.Now().Add(testkit.Patience))
		var late net.Error
		if _, err := c.Read(b); err == nil || err == io.EOF || errors.As(err, &late) && late.Timeout() {
			t.Errorf("the open connection was not reset: %v", err)
		}
	})
	if !between {
		t.Error("nothing was done between")
	}
	p.Close()
}

// A device that fails is told, once, and all can still be closed.
func TestPlaneFails(t *testing.T) {
	testkit.CheckLeaks(t)
	ours, theirs := tuntest.Pipe(1500, tun.VnetHdr)
	p, err := newPlane(parse(t, "--proxy", "socks5://127.0.0.1:1"), ours, nil, dialing{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	p.start()
	theirs.Close()
	select {
	case err := <-p.failed:
		if err == nil {
			t.Error("no reason given")
		}
	case <-time.After(testkit.Patience):
		t.Error("nobody said that the device is gone")
	}
	stop(p, nil)
}

// Never started, or not even whole: everything is given back, the device too.
func TestPlaneNotStarted(t *testing.T) {
	testkit.CheckLeaks(t)
	ours, theirs := tuntest.Pipe(1500, tun.VnetHdr)
	defer theirs.Close()
	p, err := newPlane(
		parse(t, "--upstream", "a=socks5://127.0.0.1:1", "--rule", "direct"),
		ours,
		nil,
		dialing{},
		slog.New(slog.DiscardHandler),
	)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	p.Close()

	ours, theirs = tuntest.Pipe(1500, tun.VnetHdr)
	defer theirs.Close()
	bad := parse(t, "--proxy", "socks5://127.0.0.1:1")
	bad.Default = "nobody"
	if _, err := newPlane(bad, ours, nil, dialing{}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a default that does not exist is taken")
	}
	var h tun.Header
	if _, err := theirs.Read(&h, make([]byte, tun.MaxFrame), false); err == tun.ErrAgain {
		t.Error("the device was left open")
	}
}
