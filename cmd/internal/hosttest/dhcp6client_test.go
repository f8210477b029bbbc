package hosttest

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// clients6 are programs that ask for an address by DHCPv6 when the router advertises that there is a server. They have nothing
// to do with IPv4.
var clients6 = []client{
	{"systemd-networkd", "/lib/systemd/systemd-networkd", func(w *world) *program { return w.networkd("DHCP=ipv6") }},
	{"isc-dhcp-client", "dhclient", func(w *world) *program {
		w.sysctl("host", map[string]string{"net/ipv6/conf/eth0/accept_ra": "2"})
		return w.start("host", house(map[string]string{"/var/lib/dhcp/": ""}), nil, "dhclient", "-6", "-d", "-v", "eth0")
	}},
	{"dhcpcd", "dhcpcd", func(w *world) *program {
		return w.start("host", house(map[string]string{"/var/lib/dhcpcd/": "", "/run/dhcpcd/": ""}), nil,
			"dhcpcd", "-6", "-B", "-d", "eth0")
	}},
	{"NetworkManager", "NetworkManager", func(w *world) *program {
		return w.networkManager(strings.Replace(eth0Connection, "[ipv4]\nmethod=auto", "[ipv4]\nmethod=disabled", 1))
	}},
}

// The server cannot lease for less than two minutes, and has a lease renewed after half of the time.
const renewAfter6 = time.Minute

// dhcp6Server starts dnsmasq on the router, which leases addresses by DHCPv6, and says so in its router advertisements.
func (w *world) dhcp6Server() *program {
	w.t.Helper()
	return w.start("router", nil, nil, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0",
		"--interface=host0", "--user=root", "--pid-file=", "--dhcp-leasefile=/run/dnsmasq.leases", "--log-facility=-",
		"--dhcp-authoritative", "--enable-ra", "--ra-param=host0,4,600", "--dhcp-range="+leased6+"00,"+leased6+"ff,64,2m")
}

// leased6 is how the addresses of the server begin.
const leased6 = "2001:db8:1::77:"

// lease6 is the address that a client has given to eth0; empty: there is none, or no default route.
func (w *world) lease6() string {
	w.t.Helper()
	if !strings.Contains(w.ip("host", "-6 route show default dev eth0"), "via "+routerLL+" ") {
		return ""
	}
	for line := range strings.Lines(w.ip("host", "-6 -o addr show dev eth0 scope global")) {
		f := strings.Fields(line)
		if len(f) < 4 || strings.Contains(line, "tentative") || strings.Contains(line, "deprecated") {
			continue
		}
		if p, err := netip.ParsePrefix(f[3]); err == nil && strings.HasPrefix(p.Addr().String(), leased6) {
			return p.Addr().String()
		}
	}
	return ""
}

// renews6 is whether the tests wait for renewals of leases, for a minute each.
var renews6 = os.Getenv("VIASOCKS_SLOW") != ""

// TestClients6: with the programs that ask for an address by DHCPv6, a host with IPv6 alone gets its lease while it is closed,
// and again after kill -9. With VIASOCKS_SLOW=1, which takes four minutes, they renew it while the host is closed and up, after
// a reload and after kill -9, and need not look for another server.
func TestClients6(t *testing.T) { eachClient(t, clients6, testClient6) }

func testClient6(t *testing.T, c client) {
	w := unaddressed(t)
	w.hostServers()
	w.sysctl("host", map[string]string{"net/ipv6/conf/eth0/accept_ra": "0"})
	w.settle()
	nb := w.batcher()
	w.addressed(nb)
	b := &clientBench{world: w, start: time.Now()}
	b.rec = w.watched("eth0")
	b.rec.known(w.proxy("[" + proxy6 + "]:1080"))
	w.bare(nb)
	w.configure("proxy socks5://[" + proxy6 + "]:1080\n")
	flags := []string{"--config", configFile}
	if out, err := w.command(append([]string{"close"}, flags...)...); err != nil {
		t.Fatalf("close: %v\n%s", err, out)
	}
	b.rec.take()

	b.server = w.dhcp6Server()
	b.client = c.start(w)
	b.well6("the first lease, closed", testkit.Patience)
	b.renewed6("closed")
	d := w.up(flags...)
	b.up = true
	b.renewed6("up")
	d.reload()
	b.renewed6("reloaded")
	d.kill()
	b.up = false
	b.renewed6("killed")
	b.client.stop()
	before := b.replies6()
	b.client = c.start(w)
	w.eventually(testkit.Patience, "killed, the client started again: the server leases", func() bool {
		return b.replies6() > before
	})
	b.well6("killed, the client started again", testkit.Patience)
	d = w.up(flags...)
	b.up = true
	b.well6("up again", testkit.Patience)
	if err := d.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	w.works("stopped", "", w.lease6(), true) // though not by the proxy
}

// well6 checks that the host has its lease and its network, within limit, and that nothing has leaked meanwhile.
func (b *clientBench) well6(when string, limit time.Duration) {
	b.t.Helper()
	var lease string
	if !testkit.Until(limit, func() bool { lease = b.lease6(); return lease != "" }) {
		b.t.Fatalf("%s: no address of DHCPv6 within %v\n%s", when, limit, b.ip("host", "addr show dev eth0\n-6 route\n-6 rule"))
	}
	b.works(when, "", lease, b.up)
	b.rec.noLeak(b.world, when)
	b.t.Logf("%5.1f s: %s: %s", time.Since(b.start).Seconds(), when, lease)
}

// replies6 is how many leases the server has given or renewed.
func (b *clientBench) replies6() int { return strings.Count(b.server.log.String(), "DHCPREPLY(host0)") }

// renewed6 waits for the next renewal, which the server must answer before the client asks any other server.
func (b *clientBench) renewed6(when string) {
	b.t.Helper()
	if !renews6 {
		b.well6(when, testkit.Patience)
		return
	}
	count := func(what string) int { return strings.Count(b.server.log.String(), what+"(host0)") }
	renewals, replies, others := count("DHCPRENEW"), b.replies6(), count("DHCPREBIND")+count("DHCPSOLICIT")
	if !testkit.Until(renewAfter6+testkit.Patience, func() bool {
		return count("DHCPRENEW") > renewals && b.replies6() > replies
	}) {
		b.t.Fatalf("%s: the lease was not renewed", when)
	}
	b.well6(when+": renewed", testkit.Patience)
	if n := count("DHCPREBIND") + count("DHCPSOLICIT"); n != others {
		b.t.Errorf("%s: the client asked %d times for any server", when, n-others)
	}
}
