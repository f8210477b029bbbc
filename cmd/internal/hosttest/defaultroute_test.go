package hosttest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// The host of these tests has another subnet at times, and a gateway outside of its own network, as clouds have it.
const (
	otherHost4, otherRouter4 = "10.88.0.2", "10.88.0.1"
	otherHost6, otherRouter6 = "2001:db8:3::2", "2001:db8:3::1"
	farGateway4              = "172.31.1.1"
)

// unaddressed is a world whose host has no address and no route by eth0 yet.
func unaddressed(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.ip("router", `
addr del `+lanRouter4+`/24 dev host0
addr del `+lanRouter6+`/64 dev host0
addr add `+otherRouter4+`/24 dev host0
addr add `+otherRouter6+`/64 dev host0 nodad
addr add `+farGateway4+`/32 dev host0
`)
	// Otherwise unplug would take the router's addresses of IPv6.
	w.sysctl("router", map[string]string{"net/ipv6/conf/host0/keep_addr_on_down": "1"})
	w.ip("host", "-4 addr flush dev eth0\n-6 addr flush dev eth0 scope global")
	w.ip("host", "-4 route flush dev eth0\n-6 route flush default dev eth0")
	serve(w.listen("world", ":77"), echo)
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	return w
}

// pester makes the host send to an address of the world until the test ends: TCP and UDP, of both families, also from
// sockets that are bound to the uplink. What of it the recorder sees has leaked.
func (w *world) pester(uplink string) {
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, to := range []string{"203.0.113.66:666", "[2001:db8:f::66]:666"} {
		for _, dev := range []string{"", uplink} {
			wg.Go(func() {
				d := net.Dialer{Timeout: 100 * time.Millisecond, KeepAlive: -1, Control: bindTo(dev)}
				_ = in("host", func() error {
					for ctx.Err() == nil {
						for _, network := range []string{"udp", "tcp"} {
							if c, err := d.Dial(network, to); err == nil {
								_ = writeNow(c, putCanary(0, 0))
								c.Close()
							}
						}
						testkit.Pace(10 * time.Millisecond)
					}
					return nil
				})
			})
		}
	}
	w.t.Cleanup(func() { stop(); wg.Wait() })
}

// bindTo binds a socket to a device; empty: to none.
func bindTo(dev string) func(network, address string, c syscall.RawConn) error {
	if dev == "" {
		return nil
	}
	return func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), dev) }); e != nil {
			return e
		}
		return err
	}
}

// watched starts a recorder and what it is to watch, and shows that it would see a leak. The host must have an address
// and a default route for that, and no viasocks.
func (w *world) watched(uplink string) *recorder {
	w.t.Helper()
	rec := newRecorder(w)
	rec.known(w.proxy(proxy4 + ":1080"))
	rec.answers = answer
	w.pester(uplink)
	seen := map[string]bool{}
	w.quietly(10*time.Second, "control: without viasocks the recorder sees what the host sends", func() bool {
		for _, s := range rec.take() {
			if s.probe == 0 && s.what.proto == unix.IPPROTO_UDP {
				seen[s.what.dst.String()] = true
			}
		}
		return seen["203.0.113.66"] && seen["2001:db8:f::66"]
	})
	return rec
}

// answer is whether the host sends a frame only because of one that came from outside: an answer of its SSH, a message
// that tells a router or the proxy what became of a packet of theirs, and what they have sent to an address that the host
// had before: a host that forwards sends it back to the router. A lease of the other subnet may be renewed, too.
func answer(p packet) bool {
	sender := func(a netip.Addr) bool {
		return a == addr(proxy4) || a == addr(router4) || a == addr(otherRouter4) || a == addr(routerLL)
	}
	switch {
	case p.proto == unix.IPPROTO_TCP && p.sport == sshPort:
		return true
	case p.proto == unix.IPPROTO_UDP && p.sport == 68 && p.dport == 67: // the DHCP server of the other subnet
		return p.dst == addr(otherRouter4)
	case p.proto == unix.IPPROTO_ICMP && (p.icmp == 3 || p.icmp == 5 || p.icmp == 11), // unreachable, redirect, time exceeded
		p.proto == unix.IPPROTO_ICMPV6 && (p.icmp == 1 || p.icmp == 3):
		return sender(p.dst)
	}
	return sender(p.src)
}

// noLeak fails the test if the recorder saw anything since the last time.
func (r *recorder) noLeak(w *world, when string) {
	w.t.Helper()
	seen := r.take()
	for i, s := range seen {
		if i == 5 {
			break
		}
		w.t.Errorf("%s: leaked: %v", when, s.what)
	}
	if len(seen) > 5 {
		w.t.Errorf("%s: %d frames leaked", when, len(seen))
	}
}

// works checks that the host has its network: what its programs open is carried, and it is reached from outside. The
// addresses are the host's; an empty one is left out.
func (w *world) works(when, v4, v6 string, carried bool) {
	w.t.Helper()
	for _, o := range []struct{ host, client, to string }{
		{v4, client4, "203.0.113.7"},
		{v6, client6, "2001:db8:f::7"},
	} {
		if o.host == "" {
			continue
		}
		w.eventually(reachWithin, when+": ssh to "+o.host, func() bool { return w.knock(o.client, o.host) == nil })
		if carried {
			w.eventually(reachWithin, when+": a connection to "+o.to+" is carried", func() bool { return w.fetch(o.to) == nil })
		}
	}
}

// knock is one try to reach the host's SSH from outside.
func (w *world) knock(client, host string) error {
	return in("world", func() error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(client)}, Timeout: 2 * time.Second, KeepAlive: -1}
		c, err := d.Dial("tcp", netipAddrPort(host, sshPort).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		_, err = c.Read(make([]byte, 10))
		return err
	})
}

// fetch is one try of a program on the host to get something from the world.
func (w *world) fetch(to string) error {
	return in("host", func() error {
		c, err := (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: -1}).Dial("tcp", netipAddrPort(to, 77).String())
		if err != nil {
			return err
		}
		defer c.Close()
		return exchange(c, 100)
	})
}

// A routeCase configures the host's eth0 in one way, once, with nothing but what the kernel answers between its steps.
type routeCase struct {
	name  string
	tries int
	try   func(w *world, b *batcher, i int) error
}

const tries = 20

var routeCases = []routeCase{
	{"one batch", tries, func(w *world, b *batcher, i int) error {
		r := kernelRoute{via: router4}
		if i%2 == 1 { // as networkd and NetworkManager write it
			r.src, r.metric = host4, 1024
		}
		return b.send(b.address(host4+"/24"), b.addRoute(r))
	}},
	{"replaced", tries, func(w *world, b *batcher, _ int) error {
		return b.send(b.address(host4+"/24"), b.replaceRoute(kernelRoute{via: router4}),
			b.replaceRoute(kernelRoute{via: router4, metric: 7}))
	}},
	{"another subnet", tries, func(w *world, b *batcher, i int) error {
		if i%2 == 0 {
			return b.send(b.address(otherHost4+"/24"), b.addRoute(kernelRoute{via: otherRouter4}))
		}
		return b.send(b.address(host4+"/24"), b.addRoute(kernelRoute{via: router4}))
	}},
	{"carrier lost", 5, func(w *world, b *batcher, _ int) error {
		w.unplug(0, func() { w.bare(b) })
		return b.send(b.address(host4+"/24"), b.addRoute(kernelRoute{via: router4}))
	}},
	{"/32, gateway by a route", tries, func(w *world, b *batcher, _ int) error {
		return b.send(b.address(host4+"/32"), b.addRoute(kernelRoute{to: farGateway4 + "/32"}),
			b.addRoute(kernelRoute{via: farGateway4}))
	}},
	{"/32, deleted, again", tries, func(w *world, b *batcher, _ int) error {
		def := kernelRoute{via: farGateway4}
		_ = b.send(b.address(host4+"/32"), b.addRoute(kernelRoute{to: farGateway4 + "/32"}),
			b.addRoute(kernelRoute{via: farGateway4, onlink: true}))
		return b.send(b.delRoute(def), b.addRoute(def))
	}},
	{"/32, onlink", tries, func(w *world, b *batcher, _ int) error {
		return b.send(b.address(host4+"/32"), b.addRoute(kernelRoute{via: farGateway4, onlink: true}))
	}},
	{"IPv6", tries, func(w *world, b *batcher, i int) error {
		if i%2 == 0 {
			return b.send(b.address(host6+"/64"), b.addRoute(kernelRoute{via: router6, v6: true}))
		}
		return b.send(b.address(otherHost6+"/64"), b.addRoute(kernelRoute{via: otherRouter6, v6: true}))
	}},
	{"IPv6, link-local", tries, func(w *world, b *batcher, _ int) error {
		return b.send(b.address(host6+"/64"), b.addRoute(kernelRoute{via: routerLL, v6: true, metric: 1024}))
	}},
	{"IPv6 /128", tries, func(w *world, b *batcher, _ int) error {
		return b.send(b.address(host6+"/128"), b.addRoute(kernelRoute{to: router6 + "/128", v6: true}),
			b.addRoute(kernelRoute{via: router6, v6: true}))
	}},
}

// addressed gives eth0 its usual addresses and routes; without onlink the kernel would ask our rules.
func (w *world) addressed(b *batcher) {
	w.t.Helper()
	w.bare(b)
	w.ip("host", `
addr add `+host4+`/24 dev eth0
addr add `+host6+`/64 dev eth0 nodad
route add default via `+router4+` dev eth0 onlink
-6 route add default via `+router6+` dev eth0
`)
}

func (w *world) bare(b *batcher) {
	w.t.Helper()
	if err := b.bare(); err != nil {
		w.t.Fatalf("cannot take the addresses and routes of eth0 away: %v", err)
	}
}

// accepted runs all cases and returns, of each, how many tries the kernel accepted.
func (w *world) accepted(when string, b *batcher) []string {
	w.t.Helper()
	var row []string
	for _, c := range routeCases {
		n := 0
		var why error
		for i := range c.tries {
			w.bare(b)
			if i%8 == 7 { // by then a running viasocks has taken notice
				testkit.Pace(300 * time.Millisecond)
			}
			if err := c.try(w, b, i); err != nil {
				why = err
			} else {
				n++
			}
		}
		if n < c.tries {
			w.t.Errorf("%s: %s: %d of %d accepted: %v", when, c.name, n, c.tries, why)
		}
		row = append(row, fmt.Sprintf("%d/%d", n, c.tries))
	}
	return row
}

// defaultRoutesCases are the cases of TestDefaultRoutes.
var defaultRoutesCases = []struct {
	name  string
	flags []string
}{
	{"default options", nil},
	{"lan carry", []string{"--lan", "carry"}},
	{"lan refuse", []string{"--lan", "refuse"}},
	{"include-uid", []string{"--include-uid", "0"}},
	{"exclude-uid", []string{"--exclude-uid", "12345"}},
	{"strict", []string{"--strict"}},
}

// TestDefaultRoutes: whatever viasocks does, the kernel accepts a default route at the same moment as the address that it
// goes by, as without viasocks, and the host then has its network. DHCP clients try once.
func TestDefaultRoutes(t *testing.T) {
	t.Parallel()
	for _, o := range defaultRoutesCases {
		t.Run(o.name, func(t *testing.T) {
			if !apart(t) {
				return
			}
			if o.name == "exclude-uid" {
				rootOfTheMachine(t) // elsewhere the user does not exist
			}
			w := unaddressed(t)
			w.hostServers()
			b := w.batcher()
			table := map[string][]string{"without viasocks": w.accepted("without viasocks", b)}
			w.addressed(b)
			rec := w.watched("eth0")
			flags := append([]string{"--proxy", proxyURL}, o.flags...)

			// `close` before there is an address, as viasocks-closed.service does.
			w.bare(b)
			if out, err := w.command(append([]string{"close"}, flags...)...); err != nil {
				t.Fatalf("close: %v\n%s", err, out)
			}
			rec.take()
			table["closed"] = w.accepted("closed", b)
			rec.noLeak(w, "closed")
			w.addressed(b)
			w.works("closed", host4, host6, false)
			d := w.up(flags...)
			w.works("up after close", host4, host6, true)

			table["up"] = w.accepted("up", b)
			w.bare(b)
			if err := b.send(b.address(otherHost4+"/24"), b.addRoute(kernelRoute{via: otherRouter4})); err != nil {
				t.Errorf("up, another subnet at last: %v", err)
			}
			if err := b.send(b.address(otherHost6+"/64"), b.addRoute(kernelRoute{via: otherRouter6, v6: true})); err != nil {
				t.Errorf("up, another subnet at last, IPv6: %v", err)
			}
			w.works("up, in another subnet", otherHost4, otherHost6, true)
			w.addressed(b)
			rec.noLeak(w, "up")

			d.kill()
			table["killed"] = w.accepted("killed", b)
			w.addressed(b)
			w.works("killed", host4, host6, false)
			rec.noLeak(w, "killed")
			t.Log(routeTable(o.name, table))
		})
	}
}

func routeTable(name string, rows map[string][]string) string {
	var s strings.Builder
	fmt.Fprintf(&s, "default routes accepted, %s\n", name)
	for i, c := range routeCases {
		fmt.Fprintf(&s, "%-26s", c.name)
		for _, r := range []string{"without viasocks", "closed", "up", "killed"} {
			fmt.Fprintf(&s, " %s %-6s", r, rows[r][i])
		}
		s.WriteString("\n")
	}
	return s.String()
}
