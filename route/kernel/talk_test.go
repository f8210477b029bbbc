package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// talker is a program with a UDP port of its own on the host, and forger somebody outside with any address and port.
type talker struct {
	t    *testing.T
	w    *world
	v6   bool
	port int
	conn *net.UDPConn
}

func (k *talker) open() {
	k.t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{Port: k.port})
	if err != nil {
		k.t.Fatal(err)
	}
	k.conn = c
	k.port = c.LocalAddr().(*net.UDPAddr).Port
}

// peer is an endpoint in the world.
func (k *talker) peer(n int) netip.AddrPort {
	if k.v6 {
		return netip.MustParseAddrPort(fmt.Sprintf("[2001:db8:9::%x]:%d", 0x100+n, 7000+n))
	}
	return netip.MustParseAddrPort(fmt.Sprintf("203.0.113.%d:%d", 100+n, 7000+n))
}

// forge sends a datagram to the program's port as if a peer had. It has come to the host when this returns.
func (k *talker) forge(n int) {
	k.t.Helper()
	to := netip.MustParseAddr("198.51.100.2")
	if k.v6 {
		to = netip.MustParseAddr("2001:db8:1::2")
	}
	k.w.in(func() {
		from := net.UDPAddrFromAddrPort(k.peer(n))
		lc := net.ListenConfig{Control: transparent}
		c, err := lc.ListenPacket(k.t.Context(), "udp", from.String())
		if err != nil {
			k.t.Error(err)
			return
		}
		defer c.Close()
		if _, err := c.WriteTo([]byte("forged"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, uint16(k.port)))); err != nil {
			k.t.Error(err)
		}
	})
	testkit.Settle(5*time.Millisecond, "conntrack has it")
}

// left is whether a datagram to a peer leaves the host. What is wanted to leave is sent more than once.
func (k *talker) left(want bool, n int) bool {
	k.t.Helper()
	to := net.UDPAddrFromAddrPort(k.peer(n))
	return k.w.passes(want, func() error {
		_, err := k.conn.WriteTo([]byte("own"), to)
		return err
	})
}

// forget is a flow that conntrack has forgotten, as it does half a minute after the last datagram.
func forget(t *testing.T) {
	t.Helper()
	for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, everyFlow{}); err != nil {
			t.Error(err)
		}
	}
}

type everyFlow struct{}

func (everyFlow) MatchConntrackFlow(*netlink.ConntrackFlow) bool { return true }

// A datagram that somebody forges moves no flow past the proxy, whenever it comes; who really serves is left alone.
func TestForgedDatagram(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, rp := range []string{"0", "1", "2"} {
			if v6 && rp != "0" {
				continue // it is for IPv4
			}
			t.Run(fmt.Sprintf("IPv6 %v, rp_filter %s", v6, rp), func(t *testing.T) {
				inNamespace(t, func(t *testing.T) { forgedDatagram(t, v6, rp) })
			})
		}
	}
}

func forgedDatagram(t *testing.T, v6 bool, rp string) {
	w := newWorld(t)
	for _, dev := range []string{"all", "eth0"} {
		if err := writeSysctl("net/ipv4/conf/"+dev+"/rp_filter", rp); err != nil {
			t.Fatal(err)
		}
	}
	w.isAnyone(t)
	c := testConfig(t)
	c.Guard = 30 * time.Second
	h, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Shut(); err != nil {
		t.Fatal(err)
	}
	k := &talker{t: t, w: w, v6: v6}
	k.program() // the host is closed, and has no TUN yet
	k.none("closed", 1)
	k.forge(2)
	k.none("closed, forged after the first that was refused", 2)
	k.end()

	tun := testTUN(t)
	if err := h.Steer(); err != nil {
		t.Fatal(err)
	}
	k.forgedBefore()
	k.forgedBetween(h, map[bool]int{true: 1, false: 3}[rp == "1" && !v6])
	k.servers()
	down(t, h)
	tun.Close()
}

// program opens a socket with a port of its own.
func (k *talker) program() { k.port = 0; k.open() }

func (k *talker) end() { k.conn.Close() }

func (k *talker) none(what string, n int) {
	k.t.Helper()
	if k.left(false, n) {
		k.t.Errorf("%s: it left the host", what)
	}
}

// forgedBefore forges before the program has its port.
func (k *talker) forgedBefore() {
	k.t.Helper()
	k.program() // the port is free when the forged one comes
	k.end()
	k.forge(1)
	k.open()
	k.none("forged before the port was open", 1)
	for range 5 {
		k.forge(1)
		k.none("forged again", 1)
	}
	k.end()
}

// forgedBetween forges while the program speaks, which hears want of three.
func (k *talker) forgedBetween(h *Host, want int) {
	k.t.Helper()
	k.program()
	k.forge(1)
	k.none("another address", 2)
	k.none("forged before the first of all", 1)
	k.forge(3)
	k.none("forged before the first to that address", 3)
	k.none("known", 2)
	forget(k.t)
	k.forge(2)
	_ = k.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	heard := 0
	for b := make([]byte, 100); ; heard++ {
		if _, _, err := k.conn.ReadFrom(b); err != nil {
			break
		}
	}
	if heard != want {
		k.t.Errorf("the program heard %d forged datagrams, want %d", heard, want)
	}
	k.none("forged after conntrack forgot", 2)
	k.forge(4)
	if err := h.Change(Config{LAN: LANRefuse}); err != nil {
		k.t.Fatal(err)
	}
	k.none("forged before the filter was replaced", 4)
	k.forge(5)
	k.none("forged after the filter was replaced", 5)
	k.end()
}

// servers are left alone.
func (k *talker) servers() {
	k.t.Helper()
	k.program() // a server
	k.forge(1)
	if !k.left(true, 1) {
		k.t.Errorf("a server does not answer")
	}
	forget(k.t)
	if !k.left(true, 1) {
		k.t.Errorf("a server that speaks first to its client does not reach it")
	}
	k.forge(1)
	if !k.left(true, 1) {
		k.t.Errorf("a server does not answer who answers it")
	}
	k.none("a server that speaks to a stranger", 2)
	k.none("the same to its client, then", 1)
	k.end()

	// A server that was not there yet when its client asked first.
	k.program()
	k.end()
	k.forge(1)
	k.open()
	k.forge(1)
	if !k.left(true, 1) {
		k.t.Errorf("a server that began late does not answer")
	}
	k.end()
}

// transparent lets a socket have any address.
func transparent(network, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		if network == "udp6" {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		}
	})
	return errors.Join(err, cerr)
}

// The published port of a container is treated alike: it answers directly until it has sent something for the TUN.
func TestForgedToContainer(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		k := newContainer(t)
		nft(t, "add table ip nat")
		nft(t, "add chain ip nat prerouting { type nat hook prerouting priority -100; }")
		nft(t, "add rule ip nat prerouting fib daddr type local udp dport 5555 dnat to 172.17.0.2:5555")
		w.in(func() { ip(t, "route replace local 203.0.113.0/24 dev lo", "route add default via 198.51.100.2") })
		settled(t)
		h, tun := up(t, testConfig(t))
		program := &talker{t: t, w: w, port: 5555}
		k.in(program.open)
		program.forge(1)
		if !program.left(true, 1) {
			t.Error("a published port does not answer")
		}
		program.forge(2)
		for _, n := range []int{3, 2, 1} { // 3 has asked nothing: it is spoken to first
			if program.left(false, n) {
				t.Errorf("to peer %d: it left the host", n)
			}
		}
		program.conn.Close()
		down(t, h)
		tun.Close()
	})
}
