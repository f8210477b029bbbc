package kernel

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// gatewayAcceptedCases are the cases of TestGatewayAccepted.
var gatewayAcceptedCases = []struct{ name, lines string }{
	{"the same lease again", "addr add 198.51.100.2/24 dev eth0\nroute add default via 198.51.100.1 dev eth0"},
	{"without a device", "addr add 198.51.100.2/24 dev eth0\nroute add default via 198.51.100.1"},
	{"private network", "addr add 10.66.0.2/24 dev eth0\nroute add default via 10.66.0.1 dev eth0"},
	{"gateway outside of a /32", "addr add 198.51.100.9/32 dev eth0\nroute add 172.31.1.1 dev eth0\n" +
		"route add default via 172.31.1.1 dev eth0"},
	{
		"nexthop object",
		"addr add 198.51.100.2/24 dev eth0\nnexthop add id 7 via 198.51.100.1 dev eth0\nroute add default nhid 7",
	},
	{"another routing table", "addr add 198.51.100.2/24 dev eth0\nroute add default via 198.51.100.1 dev eth0 table 77"},
	{
		"two halves",
		"addr add 198.51.100.2/24 dev eth0\nroute add 0.0.0.0/1 via 198.51.100.1\nroute add 128.0.0.0/1 via 198.51.100.1",
	},
	{"IPv6", "addr add 2001:db8:5::2/64 dev eth0 nodad\nroute add default via 2001:db8:5::1 dev eth0"},
	{"IPv6 without a device", "addr add 2001:db8:5::2/64 dev eth0 nodad\nroute add default via 2001:db8:5::1"},
	{"IPv6 link-local gateway", "addr add fe80::2/64 dev eth0 nodad\nroute add default via fe80::1 dev eth0"},
}

// The kernel looks the gateway of a new route up by the ip rules. A default route must be accepted while the host is
// steered or closed, and with nobody there who reacts to the address that came before it: Run is not called here.
func TestGatewayAccepted(t *testing.T) {
	batches := gatewayAcceptedCases
	options := []struct {
		name string
		set  func(*Config)
	}{
		{"defaults", func(*Config) {}},
		{"lan carry", func(c *Config) { c.LAN = LANCarry }},
		{"lan refuse", func(c *Config) { c.LAN = LANRefuse }},
		{"strict", func(c *Config) { c.Strict = true }},
		{"inbound carry", func(c *Config) { c.CarryInbound = true }},
		{"include a user", func(c *Config) { c.Include.UIDs = []UIDRange{{1000, 1000}} }},
		{"exclude root", func(c *Config) { c.Exclude.UIDs = []UIDRange{{0, 0}} }},
		{"exclude a user", func(c *Config) { c.Exclude.UIDs = []UIDRange{{1000, 1000}} }},
	}
	for _, o := range options {
		t.Run(o.name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				c := testConfig(t)
				o.set(&c)
				h, tun := up(t, c)
				try := func(when string) {
					t.Helper()
					for _, b := range batches {
						ip(t, "addr flush dev eth0") // IPv4's routes go with it
						_ = exec.Command("ip", "nexthop", "del", "id", "7").Run()
						_ = exec.Command("ip", "-6", "route", "del", "default").Run()
						cmd := exec.Command("ip", "-batch", "-")
						cmd.Stdin = strings.NewReader(b.lines)
						if out, err := cmd.CombinedOutput(); err != nil {
							t.Errorf("%s, %s: %v: %s", when, b.name, err, out)
						}
					}
				}
				try("up")
				ip(t, "link set "+c.TUN+" down")
				try("device down")
				tun.Close()
				ip(t, "link del "+c.TUN)
				try("device gone")
				if err := h.Unsteer(); err != nil {
					t.Fatal(err)
				}
				try("filter only")
				down(t, h)
			})
		})
	}
}

// A closed host refuses at once, also sockets that ask for neighbours only and so pass the rules.
func TestRefusedByRoute(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConfig(t)
		c.LAN = LANRefuse
		h, tun := up(t, c)
		ip(t, "link set "+c.TUN+" down")
		for _, dst := range []string{far4, lan4, "198.51.100.1"} {
			for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
				fd, err := unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					t.Fatal(err)
				}
				if err := unix.Connect(fd,
					sockaddr(netip.MustParseAddrPort(fmt.Sprintf("%s:80", dst)))); err != unix.EHOSTUNREACH {
					t.Errorf("connect to %s, type %d: %v, want %v", dst, typ, err, unix.EHOSTUNREACH)
				}
				unix.Close(fd)
				fd, err = unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					t.Fatal(err)
				}
				_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DONTROUTE, 1)
				_ = unix.Connect(fd, sockaddr(netip.MustParseAddrPort(fmt.Sprintf("%s:80", dst))))
				_, _ = unix.Write(fd, []byte("to a neighbour"))
				unix.Close(fd)
			}
		}
		if seen := w.take(); len(seen) != 0 {
			t.Errorf("left the host: %v", seen)
		}
		tun.Close()
		down(t, h)
	})
}
