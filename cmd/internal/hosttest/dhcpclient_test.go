package hosttest

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// client is a program that configures a host's network.
type client struct {
	name    string
	program string
	start   func(w *world) *program
}

var clients = []client{
	{"systemd-networkd", "/lib/systemd/systemd-networkd", func(w *world) *program { return w.networkd("DHCP=ipv4") }},
	{"isc-dhcp-client", "dhclient", func(w *world) *program {
		// It knows nothing of IPv6 advertisements: those are the kernel's here.
		w.sysctl("host", map[string]string{"net/ipv6/conf/eth0/accept_ra": "2"})
		return w.start("host", house(map[string]string{"/var/lib/dhcp/": ""}), nil, "dhclient", "-4", "-d", "-v", "eth0")
	}},
	{"dhcpcd", "dhcpcd", func(w *world) *program {
		return w.start(
			"host",
			house(map[string]string{"/var/lib/dhcpcd/": "", "/run/dhcpcd/": ""}),
			nil,
			"dhcpcd",
			"-B",
			"-d",
			"eth0",
		)
	}},
	{"NetworkManager", "NetworkManager", func(w *world) *program { return w.networkManager(eth0Connection) }},
}

// networkd starts systemd-networkd on the host, without a bus and without systemd: it runs by itself, and says what it does on
// standard error.
func (w *world) networkd(dhcp string) *program {
	w.t.Helper()
	env := []string{"SYSTEMD_LOG_LEVEL=debug", "SYSTEMD_LOG_TARGET=console"}
	return w.start("host", house(map[string]string{
		"/etc/systemd/network/10-eth0.network": "[Match]\nName=eth0\n[Network]\n" + dhcp + "\nIPv6AcceptRA=yes\n",
	}), env, "/bin/sh", "-c", "mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp && "+
		"chown -R systemd-network: /run/systemd/netif && exec /lib/systemd/systemd-networkd")
}

// networkManager starts NetworkManager and its bus on the host.
func (w *world) networkManager(connection string) *program {
	w.t.Helper()
	return w.start("host", house(map[string]string{
		"/var/lib/NetworkManager/": "", "/run/dbus/": "", "/run/NetworkManager/": "",
		"/etc/NetworkManager/NetworkManager.conf": networkManagerConf,
		networkManagerConnection:                  connection,
	}), nil, "/bin/sh", "-c", "dbus-daemon --system --nofork --nopidfile & "+
		"while ! [ -S /run/dbus/system_bus_socket ]; do sleep .1; done; exec NetworkManager --debug")
}

const (
	networkManagerConf = `[main]
plugins=keyfile
dhcp=internal
auth-polkit=false
[keyfile]
unmanaged-devices=*,except:interface-name:eth0
[logging]
level=DEBUG
backend=syslog
`
	networkManagerConnection = "/etc/NetworkManager/system-connections/eth0.nmconnection" // must be readable by root alone
	eth0Connection           = `[connection]
id=eth0
uuid=6d1a5ff6-3b4e-4c3e-9d2e-0c1d2e3f4a5b
type=ethernet
interface-name=eth0
[ipv4]
method=auto
[ipv6]
method=auto
addr-gen-mode=eui64
`
)

// leased are the addresses that a client has given to eth0, of the subnet s.
func (w *world) leased(s subnet) (v4, v6 string) {
	w.t.Helper()
	for line := range strings.Lines(w.ip("host", "-o addr show dev eth0 scope global")) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		p, err := netip.ParsePrefix(f[3])
		switch {
		case err != nil || strings.Contains(line, "tentative") || strings.Contains(line, "deprecated"):
		case p.Masked().Contains(addr(s.router4)):
			v4 = p.Addr().String()
		case p.Masked().Contains(addr(s.router6)) && v6 == "":
			v6 = p.Addr().String()
		}
	}
	return v4, v6
}

// configured waits until the client has configured eth0 with addresses and default routes of the subnet s.
func (w *world) configured(when string, s subnet, limit time.Duration) (v4, v6 string, ok bool) {
	w.t.Helper()
	var missing string
	done := func() bool {
		v4, v6 = w.leased(s)
		r4, r6 := w.ip("host", "-4 route show default dev eth0"), w.ip("host", "-6 route show default dev eth0")
		missing = ""
		for what, there := range map[string]bool{
			"an IPv4 address": v4 != "", "an IPv6 address": v6 != "",
			"an IPv4 default route": strings.Contains(r4, "via "+s.router4+" "),
			"an IPv6 default route": strings.Contains(r6, "via "+routerLL+" "),
		} {
			if !there {
				missing += ", " + what
			}
		}
		return missing == ""
	}
	if !testkit.Until(limit, done) {
		w.t.Errorf("%s: not configured within %v: there is not%s\n%s", when, limit, missing,
			w.ip("host", "addr show dev eth0\n-4 route\n-6 route\n-4 rule\n-6 rule"))
		return v4, v6, false
	}
	return v4, v6, true
}

// clientBench is a host whose network a client configures, with a viasocks.
type clientBench struct {
	*world
	rec    *recorder
	server *program
	client *program
	net    subnet
	up     bool // viasocks runs
	start  time.Time
	closed string // the steering of the closed host
}

// steering is what viasocks has set beside the filter that does not depend on the networks which the host has at present.
func (b *clientBench) steering() string {
	b.t.Helper()
	var s strings.Builder
	for _, f := range []string{"-4 rule", "-6 rule", "-4 route show table all proto 118", "-6 route show table all proto 118"} {
		for line := range strings.Lines(b.ip("host", f)) {
			if strings.Contains(line, "proto 118") && !strings.Contains(line, "dev eth0") && !strings.Contains(line, " to ") {
				s.WriteString(line)
			}
		}
	}
	return s.String()
}

// well checks that the host has its network, within limit, and that nothing has leaked meanwhile.
func (b *clientBench) well(when string, limit time.Duration) {
	b.t.Helper()
	start := time.Now()
	v4, v6, ok := b.configured(when, b.net, limit)
	took := time.Since(start)
	if ok {
		b.works(when, v4, v6, b.up)
	}
	b.rec.noLeak(b.world, when)
	if left := b.steering(); !b.up && left != b.closed {
		b.t.Errorf("%s: our ip rules and routes are not as they were:\n%s\nbefore:\n%s", when, left, b.closed)
	}
	b.t.Logf("%5.1f s: %s: configured after %v, %s and %s",
		time.Since(b.start).Seconds(), when, took.Round(10*time.Millisecond), v4, v6)
}

// TestClients: with the programs that configure the networks of hosts, a host that is up or closed gets its network, keeps
// it and gets it again.
func TestClients(t *testing.T) { eachClient(t, clients, testClient) }

// TestLateLease: a host whose viasocks was killed long ago, and before there was a network, gets its first lease and renews it.
func TestLateLease(t *testing.T) { eachClient(t, clients, testLateLease) }

// eachClient runs a test apart with each of the clients that is installed.
func eachClient(t *testing.T, clients []client, test func(t *testing.T, c client)) {
	t.Parallel()
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			if !apart(t) {
				return
			}
			rootOfTheMachine(t)
			if _, err := exec.LookPath(c.program); err != nil {
				t.Skipf("%v; scripts/deps.sh installs it", err)
			}
			test(t, c)
		})
	}
}

const deafRules = `
table ip deaf {
	chain input {
		type filter hook input priority 0; policy accept;
		udp dport 67 ip daddr != 255.255.255.255 counter drop
	}
}
`

// newClientBench is a host that has no network yet. flags are the options of viasocks.
func newClientBench(t *testing.T) (b *clientBench, flags []string) {
	w := unaddressed(t)
	w.hostServers()
	w.ip("host", "link set eth0 down\nlink set eth0 address 02:00:00:00:77:02\nlink set eth0 up")
	w.sysctl("host", map[string]string{"net/ipv6/conf/eth0/accept_ra": "0"})
	w.settle()
	nb := w.batcher()
	w.addressed(nb)
	b = &clientBench{world: w, net: firstSubnet, start: time.Now()}
	b.rec = w.watched("eth0")
	w.bare(nb)
	w.configure("proxy " + proxyURL + "\n")
	return b, []string{"--config", configFile}
}

// begin starts the server and, for the first time, the client.
func (b *clientBench) begin(c client) {
	b.rec.take()
	b.closed = b.steering()
	b.server = b.dhcpServer(b.net)
	b.client = c.start(b.world)
	b.well("the first lease, closed", testkit.Patience)
	b.renewed("closed")
}

func testLateLease(t *testing.T, c client) {
	b, flags := newClientBench(t)
	d := b.launch(append(flags, "--wait")...)
	b.eventually(testkit.Patience, "up waits for its proxy", func() bool {
		return strings.Contains(d.log.String(), "waiting for the proxy")
	})
	d.kill()
	testkit.Pace(guard)
	b.begin(c)
	d = b.world.up(flags...)
	b.up = true
	b.well("up", testkit.Patience)
	if err := d.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
}

func testClient(t *testing.T, c client) {
	b, flags := newClientBench(t)
	w := b.world
	if out, err := w.command(append([]string{"close"}, flags...)...); err != nil {
		t.Fatalf("close: %v\n%s", err, out)
	}
	b.begin(c)
	d := w.up(flags...)
	b.up = true
	b.well("up after the first lease", testkit.Patience)
	b.renewed("up")
	d.reload()
	b.renewedAgain("reloaded")
	b.well("renewed", testkit.Patience)

	// Renewals are sent to the server alone, and those do not reach it any more.
	w.nft("router", deafRules)
	b.acknowledged("rebinding", rebindAfter+testkit.Patience)
	b.well("rebound", testkit.Patience)
	w.nft("router", "delete table ip deaf\n")

	w.unplug(time.Second, nil)
	b.well("carrier lost for 1 s", testkit.Patience)
	w.unplug(6*time.Second, nil)
	b.well("carrier lost for 6 s", testkit.Patience)
	w.unplug(2*time.Second, func() { b.move(secondSubnet) })
	b.well("another subnet", testkit.Patience+rebindAfter)

	d.kill()
	b.up = false
	b.closed = b.steering()
	b.client.stop()
	b.client = c.start(w)
	b.well("killed, the client started again", testkit.Patience)
	// The server may give another address, because this one answers its ping. dhcpcd then probes that for five seconds, and the
	// first renewal is so much later.
	b.acknowledged("killed: the new lease", testkit.Patience)
	b.renewed("killed")
	w.unplug(time.Second, nil)
	b.well("killed, carrier lost for 1 s", testkit.Patience)
	w.unplug(2*time.Second, func() { b.move(firstSubnet) })
	b.well("killed, the first subnet again", testkit.Patience+rebindAfter)
	d = w.up(flags...)
	b.up = true
	b.well("up again", testkit.Patience)
	b.rec.noLeak(w, "at the end")
	if err := d.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	v4, v6, _ := w.configured("stopped", b.net, testkit.Patience)
	w.works("stopped", v4, v6, true) // though not by the proxy
}

// acknowledged waits for one more answer of the server.
func (b *clientBench) acknowledged(what string, limit time.Duration) {
	b.t.Helper()
	before := b.server.acknowledged()
	if !testkit.Until(limit, func() bool { return b.server.acknowledged() != before }) {
		b.t.Errorf("%s: the server gave no lease within %v", what, limit)
		return
	}
}

// renewed checks that the server answers when the client first asks to renew the lease.
func (b *clientBench) renewed(when string) {
	b.t.Helper()
	b.acknowledged(when+": renewal", renewAfter+testkit.Patience)
	b.renewedAgain(when)
}

// renewedAgain is the same a moment after an answer of the server. The kernel lets a client or a server wait for many seconds
// when a busy machine removes namespaces, which spoils one renewal, but not all of them.
func (b *clientBench) renewedAgain(when string) {
	b.t.Helper()
	testkit.Tries(b.t, when+": another renewal", func() error {
		start := time.Now()
		b.acknowledged(when+": another renewal", renewAfter+testkit.Patience)
		if took := time.Since(start); took > rebindAfter-time.Second {
			return fmt.Errorf("the lease was renewed after %v, as if the server had not answered at first", took)
		}
		return nil
	})
}

// move makes another subnet of the host's link.
func (b *clientBench) move(s subnet) {
	b.t.Helper()
	b.server.stop()
	b.net = s
	_ = os.Remove("/run/dnsmasq.leases")
	b.server = b.dhcpServer(s)
}
