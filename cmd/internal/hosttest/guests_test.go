package hosttest

import (
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// bridgedGuests are two guests of a hypervisor: their ports are in a bridge with the host's uplink, and the bridge has the
// host's addresses. Frames between the guests, or between a guest and the router, only cross the host.
var bridgedGuests = []struct{ ns, v4, v6 string }{
	{"guest1", "198.51.100.21", "2001:db8:1::21"},
	{"guest2", "198.51.100.22", "2001:db8:1::22"},
}

const hypervisorBridge = "br1"

// hypervisor makes the host a hypervisor with two bridged guests, each of them with a server on port 80.
func (w *world) hypervisor() {
	w.t.Helper()
	w.ip("host", `
addr flush dev eth0
link add `+hypervisorBridge+` type bridge
link set eth0 master `+hypervisorBridge+`
link set `+hypervisorBridge+` up
addr add `+host4+`/24 dev `+hypervisorBridge+`
addr add `+host6+`/64 dev `+hypervisorBridge+` nodad
route add default via `+router4+`
-6 route replace default via `+router6+` dev `+hypervisorBridge+`
`)
	for i, g := range bridgedGuests {
		w.run("", nil, "ip", "netns", "add", g.ns)
		w.t.Cleanup(func() { w.run("", nil, "ip", "netns", "del", g.ns) })
		port := fmt.Sprintf("guest%d", i+1)
		w.ip("host", "link add "+port+" type veth peer name eth0 netns "+g.ns)
		w.ip("host", "link set "+port+" master "+hypervisorBridge+"\nlink set "+port+" up")
		w.ip(g.ns, "link set lo up\nlink set eth0 up\naddr add "+g.v4+"/24 dev eth0\naddr add "+g.v6+"/64 dev eth0 nodad")
		w.ip(g.ns, "route add default via "+router4+"\n-6 route add default via "+router6)
		serve(w.listen(g.ns, ":80"), echo)
	}
	w.settle()
}

// bridged says what of the guests' connections does not work, after one try each.
func (w *world) bridged() (errs []error) {
	try := func(from, to string, port uint16) {
		err := in(from, func() error {
			c, err := (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: -1}).Dial("tcp", netipAddrPort(to, port).String())
			if err != nil {
				return err
			}
			defer c.Close()
			return exchange(c, 5000)
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("from %s to %s: %w", from, to, err))
		}
	}
	one, two := bridgedGuests[0], bridgedGuests[1]
	try(one.ns, two.v4, 80)
	try(one.ns, two.v6, 80)
	try(one.ns, "203.0.113.7", 77)
	try(two.ns, "2001:db8:f::7", 77)
	try("world", one.v4, 80)
	try("world", two.v6, 80)
	return errs
}

// TestBridgedGuests: the guests of a hypervisor keep their network, whether frames that cross a bridge are shown to the
// filter of IP packets (docker and Kubernetes want that) or not, and the host itself stays closed.
func TestBridgedGuests(t *testing.T) {
	t.Parallel()
	for _, calls := range []string{"0", "1"} {
		for _, o := range []struct {
			name  string
			flags []string
		}{{"default options", nil}, {"strict", []string{"--strict"}}} {
			t.Run(o.name+", bridge-nf-call="+calls, func(t *testing.T) {
				if apart(t) {
					testBridgedGuests(t, calls, o.flags)
				}
			})
		}
	}
}

func testBridgedGuests(t *testing.T, calls string, flags []string) {
	w := newWorld(t)
	if _, err := os.Stat("/proc/sys/net/bridge/bridge-nf-call-iptables"); err == nil {
		w.sysctl("host", map[string]string{
			"net/bridge/bridge-nf-call-iptables": calls, "net/bridge/bridge-nf-call-ip6tables": calls,
		})
	} else if calls == "1" {
		t.Skip("the kernel has no br_netfilter: ", err)
	}
	serve(w.listen("world", ":77"), echo)
	w.hostServers()
	w.hypervisor()
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	var errs []error
	for end := time.Now().Add(20 * time.Second); ; {
		if errs = w.bridged(); errs == nil || time.Now().After(end) {
			break
		}
	}
	if errs != nil {
		t.Fatalf("control: without viasocks the guests have no network: %v", errs)
	}
	rec := w.watched(hypervisorBridge)
	host := rec.answers
	rec.answers = func(p packet) bool {
		for _, g := range bridgedGuests {
			if p.src == addr(g.v4) || p.src == addr(g.v6) {
				return true
			}
		}
		return host(p)
	}
	d := w.up(append([]string{"--proxy", proxyURL}, flags...)...)
	rec.take()
	check := func(when string, carried bool) {
		t.Helper()
		for _, err := range w.bridged() {
			t.Errorf("%s: %v", when, err)
		}
		w.works(when, host4, host6, carried)
		rec.noLeak(w, when)
	}
	check("up", true)
	d.kill()
	check("killed", false)
	testkit.Pace(guard)
	check("long after kill -9", false)
}
