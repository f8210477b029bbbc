package kernel

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// neighbour is a host in a connected private network that uses this host as its router.
type neighbour struct {
	client string // its address
	far    string // what it asks, reached by the proxy
	beyond string // an address behind another router of its network
}

// A neighbour in a connected private network uses this host as its router. What it sends goes through the proxy, and the
// answers come back to it whatever becomes of private networks. What comes out of the TUN reaches no other network.
func TestRouterOfTheLAN(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		forwardAll(t)
		neighbours := []neighbour{{"10.1.1.1", "203.0.113.77", "10.200.0.9"}, {"fd00:1::1", "2001:db8:9::77", "fd00:200::9"}}
		w.becomesNeighbour(t, neighbours[0].far, neighbours[1].far)
		lan := []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24"), netip.MustParsePrefix("fd00:1::/64")}
		for _, o := range []struct {
			name   string
			set    func(*Config)
			direct bool // this host reaches the neighbour past the proxy
		}{
			{"lan direct", func(*Config) {}, true},
			{"lan carry", func(c *Config) { c.LAN = LANCarry }, false},
			{"lan refuse", func(c *Config) { c.LAN = LANRefuse }, false},
			{"strict", func(c *Config) { c.Strict = true }, false},
			{"the network is included", func(c *Config) {
				c.Include.Networks = append(lan, netip.MustParsePrefix("203.0.113.0/24"),
					netip.MustParsePrefix("2001:db8:9::/64"))
			}, false},
		} {
			c := testConfig(t)
			o.set(&c)
			h, tun := up(t, c)
			for _, n := range neighbours {
				n.check(t, w, tun, o.name, o.direct)
			}
			down(t, h)
			tun.Close()
			for _, f := range []string{"-4", "-6"} {
				if left := ip(t, f+" rule show"); strings.Contains(left, "viasocks0") {
					t.Errorf("%s: a rule is left: %s", o.name, left)
				}
			}
		}
	})
}

// becomesNeighbour gives the world an address in a private network of either family, and has it reach the two far addresses
// by this host.
func (w *world) becomesNeighbour(t *testing.T, far4, far6 string) {
	t.Helper()
	ip(
		t,
		"addr add fd00:1::2/64 dev eth0 nodad",
		"route add 10.200.0.0/16 via 10.1.1.1",
		"-6 route add fd00:200::/64 via fd00:1::1",
	)
	w.in(func() {
		ip(
			t,
			"addr add fd00:1::1/64 dev eth0p nodad",
			"route add "+far4+"/32 via 10.1.1.2",
			"-6 route add "+far6+"/128 via fd00:1::2",
			"addr add 10.200.0.9/32 dev lo",
			"addr add fd00:200::9/128 dev lo nodad",
		)
	})
	settled(t)
}

// check has the neighbour ask something, and wants an answer to come by the TUN. Nothing may go on from there.
func (n neighbour) check(t *testing.T, w *world, tun *os.File, name string, direct bool) {
	t.Helper()
	far := netip.AddrPortFrom(netip.MustParseAddr(n.far), 7777)
	conn := w.listenUDP(t, "udp", netip.AddrPortFrom(netip.MustParseAddr(n.client), 5555))
	if _, err := conn.WriteTo([]byte("ask"), net.UDPAddrFromAddrPort(far)); err != nil {
		t.Error(err)
	}
	if !answerFromTUN(t, int(fd(tun)), n.far) {
		t.Fatalf("%s: what %s sends does not come to the TUN", name, n.client)
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	if _, from, err := conn.ReadFrom(make([]byte, 100)); err != nil || !strings.Contains(from.String(), n.far) {
		t.Errorf("%s: %s has no answer: %v, from %v", name, n.client, err, from)
	}
	if got := w.passes(direct, probe{typ: unix.SOCK_DGRAM, dst: n.client, port: 7777}.send); got != direct {
		t.Errorf("%s: this host reaches %s directly: %v, want %v", name, n.client, got, direct)
	}
	for _, to := range []string{n.beyond, n.far} { // by a router of the network, and by the default route
		out := func() error {
			_, err := tun.Write(datagram(far, netip.AddrPortFrom(netip.MustParseAddr(to), 5555)))
			return err
		}
		if w.passes(false, out) {
			t.Errorf("%s: what came out of the TUN to %s left the host", name, to)
		}
	}
	conn.Close()
}
