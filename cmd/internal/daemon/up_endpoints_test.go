package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// filter is what the kernel would hold.
type filter struct {
	mu   sync.Mutex
	has  []endpoint
	sets int
	fail error
}

func (f *filter) apply(all []endpoint) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	f.has = all
	f.sets++
	return nil
}

func (f *filter) passes(proto flow.Proto, at string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.has, endpoint{proto, netip.MustParseAddrPort(at)})
}

func TestEndpoints(t *testing.T) {
	testkit.CheckLeaks(t)
	var f filter
	e := newEndpoints(slog.New(slog.DiscardHandler))
	e.configure(
		parse(
			t,
			"--proxy",
			"socks5://192.0.2.1",
			"--upstream",
			"b=socks5://proxy.example:9",
			"--upstream",
			"c=socks5://[2001:db8::1]:1081",
		).Upstreams,
	)
	e.attach(f.apply)
	if !f.passes(flow.TCP, "192.0.2.1:1080") || !f.passes(flow.TCP, "[2001:db8::1]:1081") || len(f.has) != 2 {
		t.Errorf("%v", f.has)
	}
	e.resolver("192.0.2.53:53")
	e.resolved("proxy.example", []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("::ffff:203.0.113.2")})
	e.resolved("other.example", []netip.Addr{netip.MustParseAddr("203.0.113.66")})
	for _, at := range []string{"203.0.113.1:9", "203.0.113.2:9", "192.0.2.53:53"} {
		if !f.passes(flow.TCP, at) {
			t.Errorf("%s/tcp is not in %v", at, f.has)
		}
	}
	if !f.passes(flow.UDP, "192.0.2.53:53") || f.passes(flow.TCP, "203.0.113.66:9") {
		t.Errorf("%v", f.has)
	}
	sets := f.sets
	e.resolved("proxy.example", []netip.Addr{netip.MustParseAddr("203.0.113.1")})
	if f.sets != sets {
		t.Error("the filter was told what it knew")
	}

	relaysOf(t, e, &f)

	// What is not configured any more is gone, what is stays.
	e.configure(parse(t, "--proxy", "socks5://proxy.example:9").Upstreams)
	if f.passes(flow.TCP, "192.0.2.1:1080") || f.passes(flow.UDP, "192.0.2.1:0") || !f.passes(flow.TCP, "203.0.113.1:9") ||
		!f.passes(flow.TCP, "192.0.2.53:53") {
		t.Errorf("%v", f.has)
	}
}

// relaysOf adds relays of the server at 192.0.2.1.
func relaysOf(t *testing.T, e *endpoints, f *filter) {
	t.Helper()
	// A relay is in the filter before anybody goes there; a known one costs nothing.
	relay := netip.MustParseAddrPort("192.0.2.1:4000")
	done := make(chan bool, 1)
	e.relay("socks5://192.0.2.1:1080", relay, func() { done <- f.passes(flow.UDP, relay.String()) })
	if !<-done {
		t.Error("used before the filter knew")
	}
	called := false
	e.relay("socks5://192.0.2.1:1080", relay, func() { called = true })
	if !called {
		t.Error("a known relay has to wait")
	}
	// Many ports of one address become any port.
	var wg sync.WaitGroup
	for i := range 2 * relayMany {
		wg.Add(1)
		e.relay("socks5://192.0.2.1:1080", netip.AddrPortFrom(relay.Addr(), uint16(5000+i)), wg.Done)
	}
	wg.Wait()
	if !f.passes(flow.UDP, "192.0.2.1:0") || f.passes(flow.UDP, relay.String()) || len(f.has) > 16 {
		t.Errorf("%d: %v", len(f.has), f.has)
	}
	if got := e.of("socks5://192.0.2.1:1080"); len(got) != 2 {
		t.Errorf("%v", got)
	}
}

func TestEndpointBounds(t *testing.T) {
	var log strings.Builder
	e := newEndpoints(slog.New(slog.NewTextHandler(&log, nil)))
	e.configure(parse(t, "--proxy", "socks5://proxy.example").Upstreams)
	a := netip.MustParseAddr("203.0.113.1")
	var addrs []netip.Addr
	for range maxEndpoints + 100 {
		addrs = append(addrs, a)
		a = a.Next()
	}
	e.resolved("proxy.example", addrs)
	if n := len(e.list()); n != maxEndpoints {
		t.Errorf("%d", n)
	}
	// A proxy that names another relay each time is not remembered either.
	for range 100 {
		a = a.Next()
		done := make(chan struct{})
		e.relay("socks5://proxy.example:1080", netip.AddrPortFrom(a, 5000), func() { close(done) })
		<-done
	}
	e.mu.Lock()
	if len(e.known) != maxEndpoints || len(e.ports) != 0 {
		t.Errorf("%d endpoints, ports of %d addresses", len(e.known), len(e.ports))
	}
	e.mu.Unlock()
	f := filter{fail: errors.New("netlink is tired")}
	e.attach(f.apply)
	if !strings.Contains(log.String(), "netlink is tired") {
		t.Errorf("%s", &log)
	}
	f.fail = nil
	e.push() // what failed is tried again with the next change, and when asked
	if len(f.has) != maxEndpoints {
		t.Errorf("%d", len(f.has))
	}
}

// Relays that no association uses any more are forgotten, those in use are not, and a warning is not repeated.
func TestEndpointsForget(t *testing.T) {
	testkit.CheckLeaks(t)
	var log strings.Builder
	var f filter
	e := newEndpoints(slog.New(slog.NewTextHandler(&log, nil)))
	e.configure(parse(t, "--proxy", "socks5://192.0.2.1").Upstreams)
	e.attach(f.apply)
	relay := func(a netip.Addr) (over func()) {
		done := make(chan struct{})
		over = e.relay("socks5://192.0.2.1:1080", netip.AddrPortFrom(a, 5000), func() { close(done) })
		<-done
		return over
	}
	a := netip.MustParseAddr("203.0.113.1")
	used, twice, over := a, a.Next(), a.Next().Next()
	relay(used)
	again := relay(twice)
	relay(twice)()
	relay(over)()
	// One relay for all associations, which come and go, is remembered once.
	for range 1000 {
		relay(over)()
	}
	e.mu.Lock()
	if len(e.idle) > 3 {
		t.Errorf("%d idle relays are remembered", len(e.idle))
	}
	for _, k := range e.idle {
		k.since = k.since.Add(-2 * relayIdle)
	}
	e.mu.Unlock()
	another := over.Next()
	relay(another)
	passes := func(a netip.Addr) bool { return f.passes(flow.UDP, netip.AddrPortFrom(a, 5000).String()) }
	if !passes(used) || !passes(twice) || passes(over) || !passes(another) {
		t.Errorf("%v", f.has)
	}
	again()
	// What is idle makes room at once, and nobody is warned.
	a = another
	for range maxEndpoints {
		a = a.Next()
		relay(a)()
	}
	if !passes(used) || !passes(a) || passes(twice) || log.Len() > 0 {
		t.Errorf("%d endpoints: %s", len(f.has), &log)
	}
	// What is in use is not forgotten for others.
	for range maxEndpoints + 100 {
		a = a.Next()
		relay(a)
	}
	if n := len(e.list()); n != maxEndpoints || !passes(used) {
		t.Errorf("%d endpoints", n)
	}
	if n := strings.Count(log.String(), "too many relay addresses"); n != 1 {
		t.Errorf("%d warnings", n)
	}
}

// Ports that are taken together keep the count of their associations.
func TestEndpointsForgetPorts(t *testing.T) {
	testkit.CheckLeaks(t)
	e := newEndpoints(slog.New(slog.DiscardHandler))
	e.configure(parse(t, "--proxy", "socks5://192.0.2.1").Upstreams)
	a := netip.MustParseAddr("192.0.2.1")
	var overs []func()
	for i := range 2 * relayMany {
		done := make(chan struct{})
		overs = append(overs, e.relay("socks5://192.0.2.1:1080", netip.AddrPortFrom(a, uint16(5000+i)), func() { close(done) }))
		<-done
	}
	any := endpoint{flow.UDP, netip.AddrPortFrom(a, 0)}
	for i, over := range overs {
		e.mu.Lock()
		e.forget(0)
		if e.known[any] == nil {
			t.Fatalf("the address was forgotten with %d associations left", len(overs)-i)
		}
		e.mu.Unlock()
		over()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.forget(0); e.known[any] != nil || len(e.ports) != 0 {
		t.Errorf("the address is remembered: %v", e.ports)
	}
}

// The real client: the association comes when the filter knows its relay.
func TestEndpointsOfAssociation(t *testing.T) {
	testkit.CheckLeaks(t)
	s, err := sockstest.Listen("tcp4", "127.0.0.1:0", sockstest.WithRedirectsOnly())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	d, err := socks.NewDialer(socks.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	srv, err := socks.ParseServer(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	var f filter
	e := newEndpoints(slog.New(slog.DiscardHandler))
	e.configure(parse(t, "--proxy", s.URL()).Upstreams)
	e.attach(f.apply)
	got := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() { _ = l.Run(context.Background()); close(over) }()
	defer func() { l.Close(); <-over }()
	c, err := newClient(d, l, config.Upstream{Name: "p", Server: srv}, nil, e)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Associate(ctx, l, func(a *socks.Association, err error) {
		if err == nil {
			if !f.passes(flow.UDP, a.Relay().String()) {
				err = fmt.Errorf("%v is not in %v", a.Relay(), f.has)
			}
			a.Close()
		}
		got <- err
	})
	if err := <-got; err != nil {
		t.Error(err)
	}
	// And the relay is known to be unused when the association is over.
	idle := func() bool { e.mu.Lock(); defer e.mu.Unlock(); return len(e.idle) == 1 && e.idle[0].uses == 0 }
	if !testkit.Until(testkit.Patience, idle) {
		t.Fatal("the relay is still in use")
	}
}

// Upstreams that stay are the same ones, others are not.
func TestReloadPolicy(t *testing.T) {
	testkit.CheckLeaks(t)
	d, err := socks.NewDialer(socks.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	rl, err := relay.NewLoop(relay.Config{}) // it need not run
	if err != nil {
		t.Fatal(err)
	}
	defer rl.Close()
	p := &plane{dialer: d, loops: []*relay.Loop{rl}}
	first, ups, _ := p.policy(parse(t, "--proxy", "socks5://u:one@h", "--upstream", "b=socks5://b", "--rule", "port 1 direct"))
	p.ups = ups
	second, _, _ := p.policy(parse(t, "--proxy", "socks5://u:two@h", "--upstream", "b=socks5://b", "--rule", "port 2 direct"))
	if len(first.Upstreams) != 3 || len(second.Upstreams) != 3 {
		t.Fatalf("%v, %v", first, second)
	}
	if first.Upstreams[0] == second.Upstreams[0] {
		t.Error("another password, the same upstream")
	}
	if first.Upstreams[1] != second.Upstreams[1] || first.Upstreams[2] != second.Upstreams[2] {
		t.Error("what did not change is another one")
	}
}
