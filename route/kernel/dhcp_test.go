package kernel

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// What a DHCP client sends leaves the host, and nothing else by its ports: nobody may send to any address just because he
// has them.
func TestDHCP(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		const relayed = "203.0.113.77"
		w.in(func() { ip(t, "route replace local 203.0.113.0/24 dev lo") })
		h, tun := up(t, testConfig(t))
		for _, tt := range []struct {
			dst, bind string
			want      bool
		}{
			{"255.255.255.255", "eth0", true},
			{"198.51.100.1", "", true}, // a renewal
			{"198.51.100.1", "eth0", true},
			{lan4, "", true},
			{far4, "", false},
			{far4, "eth0", false},
			{relayed, "", false},
			{"ff02::1:2", "eth0", true}, // over IPv6, renewals go there as well
			{"fe80::1", "eth0", true},
			{"2001:db8:1::1", "", false},
			{far6, "", false},
			{far6, "eth0", false},
		} {
			if got := w.passes(tt.want, dhcpClient(tt.dst, tt.bind).send); got != tt.want {
				t.Errorf("to %s, bound to %q: passed %v", tt.dst, tt.bind, got)
			}
		}
		for _, port := range []uint16{68, 66} {
			if w.passes(false, probe{typ: unix.SOCK_DGRAM, dst: "255.255.255.255", port: port, sport: 68, bind: "eth0"}.send) {
				t.Errorf("a client's port to port %d: it left the host", port)
			}
		}
		// A server outside of the host's networks, which has answered.
		w.in(func() {
			c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(relayed), Port: 67})
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if _, err := c.WriteTo([]byte("answer"), &net.UDPAddr{IP: net.ParseIP("198.51.100.2"), Port: 68}); err != nil {
				t.Error(err)
			}
		})
		if !w.passes(true, dhcpClient(relayed, "eth0").send) {
			t.Error("the server that gave the lease is not reached")
		}
		if w.passes(false, dhcpClient(far4, "eth0").send) {
			t.Error("another one is reached as well")
		}
		down(t, h)
		tun.Close()
	})
}

// dhcpClient is what a client sends to a server, by the ports of its family.
func dhcpClient(dst, bind string) probe {
	p := probe{typ: unix.SOCK_DGRAM, dst: dst, port: 67, sport: 68, bind: bind}
	if netip.MustParseAddr(dst).Is6() {
		p.port, p.sport = 547, 546
	}
	return p
}

// A container has no exception for DHCP, neither from its ports nor to a server that this host knows.
func TestDHCPForwarded(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		k := newContainer(t)
		settled(t)
		send := func(dst string) func() error {
			return func() (err error) {
				k.in(func() { err = dhcpClient(dst, "").send() })
				return err
			}
		}
		if !w.passes(true, send(far4)) {
			t.Fatal("positive control: it was not seen")
		}
		h, tun := up(t, testConfig(t))
		for _, dst := range []string{far4, "198.51.100.1"} {
			if w.passes(false, send(dst)) {
				t.Errorf("it left the host to %s", dst)
			}
		}
		ip(t, "-4 rule flush protocol 118") // the filter alone
		for _, dst := range []string{far4, "198.51.100.1"} {
			if w.passes(false, send(dst)) {
				t.Errorf("without the rules: it left the host to %s", dst)
			}
		}
		down(t, h)
		tun.Close()
	})
}

// rawDHCP sends a datagram from a client's port by a raw socket, as dhcpcd does when it renews a lease.
func rawDHCP(dst string, port uint16) func() error {
	return func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		b := append(append(be16(68), be16(port)...), 0, 14, 0, 0)
		return unix.Sendto(fd, append(b, "canary"...), 0, sockaddr(netip.AddrPortFrom(netip.MustParseAddr(dst), 0)))
	}
}

// TestDHCPRaw: a renewal by a raw socket leaves whatever the state of the host, and nothing else that such a socket sends.
func TestDHCPRaw(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		check := func(when string) {
			t.Helper()
			for _, dst := range []string{"198.51.100.1", lan4} {
				if !w.passes(true, rawDHCP(dst, 67)) {
					t.Errorf("%s: a renewal did not reach %s", when, dst)
				}
			}
			if w.passes(false, rawDHCP(far4, 67)) || w.passes(false, rawDHCP("198.51.100.1", 66)) {
				t.Errorf("%s: something else left the host", when)
			}
		}
		for name, lan := range map[string]LANMode{"direct": LANDirect, "carry": LANCarry} {
			c := testConfig(t)
			c.LAN, c.Guard = lan, time.Second
			h, tun := up(t, c)
			if err := h.refreshGuard(); err != nil {
				t.Fatal(err)
			}
			check(name + ": up")
			testkit.Pace(1100 * time.Millisecond)
			check(name + ": the guard has lapsed")
			if err := h.Steer(); err != nil {
				t.Fatal(err)
			}
			check(name + ": steered again")
			if err := h.Unguard(); err != nil {
				t.Fatal(err)
			}
			check(name + ": without the guard")
			if err := rawDHCP(far4, 67)(); err != unix.EPERM {
				t.Errorf("%s: to another: %v, want EPERM", name, err)
			}
			down(t, h)
			tun.Close()
		}
	})
}
