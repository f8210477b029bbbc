package kernel

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// dialIn connects from the world and takes the greeting.
func (w *world) dialIn(t *testing.T, network, addr string) (c net.Conn) {
	t.Helper()
	w.in(func() {
		var err error
		d := net.Dialer{Timeout: testkit.Patience}
		if c, err = d.Dial(network, addr); err != nil {
			t.Errorf("from outside to %s: %v", addr, err)
			return
		}
		if err := hello(c); err != nil {
			t.Errorf("from outside to %s: %v", addr, err)
		}
	})
	return c
}

// inSame opens a listener on the thread of the test: its namespace.
func listenHere(t *testing.T, addr string) net.Listener {
	t.Helper()
	return tcpServer(t, "tcp", addr)
}

// A container behind a bridge: its published port is reached, what it dials is captured or refused.
func TestContainer(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		k := newContainer(t)
		nft(t, "add table ip nat")
		nft(t, "add chain ip nat prerouting { type nat hook prerouting priority -100; }")
		nft(t, "add chain ip nat postrouting { type nat hook postrouting priority 100; }")
		nft(t, "add rule ip nat prerouting fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80")
		nft(t, "add rule ip nat postrouting ip saddr 172.17.0.0/16 oifname != docker0 masquerade")
		var l net.Listener
		k.in(func() { l = tcpServer(t, "tcp", ":80") })
		defer l.Close()
		w.in(func() { ip(t, "route replace 198.51.100.2/32 dev eth0p src "+far4) })
		settled(t)
		before := state(t)
		h, tun := up(t, testConfig(t))
		if c := w.dialIn(t, "tcp", "198.51.100.2:8080"); c != nil {
			if err := talk(c); err != nil {
				t.Error(err)
			}
			c.Close()
		}
		c, err := net.DialTimeout("tcp", "172.17.0.2:80", testkit.Patience)
		if err != nil {
			t.Errorf("from the host to the container: %v", err)
		} else {
			c.Close()
		}
		w.take()
		k.in(func() { _ = probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777, sport: 5555}.send() })
		if s := w.take(); len(s) > 0 {
			t.Errorf("the container got out: %v", s)
		}
		b := make([]byte, 2000)
		testkit.Eventually(t, "something of the container in the TUN", func() bool {
			_, err := unix.Read(int(fd(tun)), b)
			return err == nil
		})
		ip(t, "-4 rule flush protocol 118")
		for range 3 { // the refusal of the first must not make an answer of the next
			k.in(func() { _ = probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777, sport: 5555}.send() })
		}
		if s := w.take(); len(s) > 0 {
			t.Errorf("the container got out without the rules: %v", s)
		}
		down(t, h)
		tun.Close()
		checkRestored(t, before)
	})
}

// The TUN's address answers nobody on the LAN, not even by ARP.
func TestTUNAddress(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		h, tun := up(t, testConfig(t))
		l := listenHere(t, ":2222")
		defer l.Close()
		w.in(func() {
			ip(t, "route replace 198.18.0.1/32 dev eth0p", "-6 route replace fd76:6961:736f:636b::1/128 via 2001:db8:1::2")
			for _, a := range []string{"198.18.0.1:2222", "[fd76:6961:736f:636b::1]:2222"} {
				if c, err := net.DialTimeout("tcp", a, 300*time.Millisecond); err == nil {
					t.Errorf("%s answers", a)
					c.Close()
				}
			}
			if s := ip(t, "neigh show to 198.18.0.1"); strings.Contains(s, "lladdr") {
				t.Errorf("ARP was answered: %s", s)
			}
		})
		down(t, h)
		tun.Close()
	})
}

func TestExclude(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConfig(t)
		c.Exclude = Selection{
			Networks: []netip.Prefix{netip.MustParsePrefix(far4 + "/32"), netip.MustParsePrefix(far6 + "/64")},
			Ports:    []PortRange{{123, 123}, {5000, 5010}, {65000, 65535}, {65535, 65535}},
			UIDs:     []UIDRange{{4000, 4010}},
			Devices:  []string{"wg9"},
		}
		h, tun := up(t, c)
		for _, tt := range []struct {
			dst  string
			port uint16
			want bool
		}{{far4, 7777, true}, {far6, 7777, true}, {"198.51.100.1", 123, true}, {"2001:db8:1::1", 5005, true},
			{"198.51.100.1", 65534, true}, {"198.51.100.1", 65535, true}, {"2001:db8:1::1", 65535, true},
			{"198.51.100.1", 64999, false}, {"198.51.100.1", 124, false}, {"2001:db8:1::1", 4999, false}} {
			if got := w.passes(tt.want, probe{typ: unix.SOCK_DGRAM, dst: tt.dst, port: tt.port}.send); got != tt.want {
				t.Errorf("%s port %d: passed %v, want %v", tt.dst, tt.port, got, tt.want)
			}
		}
		down(t, h)
		tun.Close()

		c = testConfig(t)
		c.Include = Selection{Networks: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}, UIDs: []UIDRange{{4000, 4000}}}
		h, tun = up(t, c)
		for _, tt := range []struct {
			dst  string
			want bool
		}{{far4, false}, {far6, true}, {"198.51.100.1", true}} {
			if got := w.passes(tt.want, probe{typ: unix.SOCK_DGRAM, dst: tt.dst, port: 7777}.send); got != tt.want {
				t.Errorf("include: %s: passed %v, want %v", tt.dst, got, tt.want)
			}
		}
		down(t, h)
		tun.Close()
	})
}

// An ip rule takes no port 65535: what a rule lets out there goes past the TUN by its mark.
func TestStraightLastPort(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConfig(t)
		c.Direct = true
		far := netip.MustParsePrefix(far4 + "/32")
		c.Straight = []Straight{
			{Proto: unix.IPPROTO_UDP, Net: far, Ports: PortRange{65535, 65535}},
			{Proto: unix.IPPROTO_UDP, Ports: PortRange{0, 99}}, {Proto: unix.IPPROTO_UDP, Ports: PortRange{65001, 65535}},
		}
		h, tun := up(t, c)
		for _, tt := range []struct {
			dst  string
			port uint16
			want bool
		}{{far4, 65535, true}, {far4, 65534, true}, {far6, 65535, true}, {far6, 99, true},
			{far4, 65000, false}, {far6, 100, false}} {
			if got := w.passes(tt.want, probe{typ: unix.SOCK_DGRAM, dst: tt.dst, port: tt.port}.send); got != tt.want {
				t.Errorf("%s port %d: passed %v, want %v", tt.dst, tt.port, got, tt.want)
			}
		}
		down(t, h)
		tun.Close()
	})
}

func TestLANModes(t *testing.T) {
	for mode, want := range map[LANMode]bool{LANDirect: true, LANCarry: false, LANRefuse: false} {
		inNamespace(t, func(t *testing.T) {
			w := newWorld(t)
			c := testConfig(t)
			c.LAN = mode
			h, tun := up(t, c)
			if got := w.passes(want, probe{typ: unix.SOCK_DGRAM, dst: lan4, port: 7777}.send); got != want {
				t.Errorf("mode %d: passed %v, want %v", mode, got, want)
			}
			// A network that comes is known at once, a route of option 121 is not believed.
			ip(t, "route add 0.0.0.0/1 via 198.51.100.1 dev eth0", "route add 128.0.0.0/1 via 198.51.100.1 dev eth0")
			w.mustBeClosed(t, "steered")
			down(t, h)
			tun.Close()
		})
	}
}

// strictCases are the cases of TestStrict.
var strictCases = []byte{
	0x45,
	0,
	0,
	28,
	0,
	0,
	0,
	0,
	64,
	253,
	0,
	0,
	198,
	51,
	100,
	2,
	203,
	0,
	113,
	9,
	'c',
	'a',
	'n',
	'a',
	'r',
	'y',
	'!',
	'!',
}

// Raw frames, with Strict.
func TestStrict(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConfig(t)
		c.Strict = true
		frame := func() error {
			s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_IP)))
			if err != nil {
				return err
			}
			defer unix.Close(s)
			k, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			p := strictCases
			return unix.Sendto(
				s,
				p,
				0,
				&unix.SockaddrLinklayer{
					Protocol: htons(unix.ETH_P_IP),
					Ifindex:  k.Index,
					Halen:    6,
					Addr:     [8]byte{255, 255, 255, 255, 255, 255},
				},
			)
		}
		if !w.passes(true, frame) {
			t.Fatal("positive control: a raw frame was not seen")
		}
		h, tun := up(t, c)
		if err := frame(); err != unix.ENOBUFS {
			t.Errorf("a raw frame: %v, want ENOBUFS", err)
		}
		w.mustBeClosed(t, "steered")
		down(t, h)
		tun.Close()
	})
}

func fd(f *os.File) (n uintptr) {
	c, err := f.SyscallConn()
	if err == nil {
		_ = c.Control(func(fd uintptr) { n = fd })
	}
	return n
}

// What this host opened before `up` is not from outside, though nobody tracked it and its far end speaks first.
func TestOldTalk(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		var conns, peers []net.Conn
		for _, n := range []string{"tcp", "udp"} {
			for _, a := range []string{far4 + ":79", "[" + far6 + "]:79"} {
				conn, peer := w.farPair(t, n, a)
				defer conn.Close()
				defer peer.Close()
				conns, peers = append(conns, conn), append(peers, peer)
			}
		}
		c := testConfig(t)
		var err error
		if c.Kept, err = Established(); err != nil || len(c.Kept) != 2 {
			t.Errorf("%v, %v", c.Kept, err)
		}
		h, tun := up(t, c)
		w.take()
		for range 3 {
			for _, peer := range peers {
				_, _ = peer.Write([]byte("talk"))
			}
			testkit.Pace(20 * time.Millisecond)
			for _, conn := range conns {
				_, _ = conn.Write([]byte("answer"))
			}
		}
		if s := w.take(); len(s) > 0 {
			t.Errorf("goes on around us: %v", s)
		}
		down(t, h)
		tun.Close()
	})
}

// farPair connects the host with an endpoint of the world, and returns both ends.
func (w *world) farPair(t *testing.T, network, addr string) (conn, peer net.Conn) {
	t.Helper()
	var l net.Listener
	var u *net.UDPConn
	w.in(func() {
		if network == "tcp" {
			l, _ = net.Listen(network, addr)
		} else {
			ua, _ := net.ResolveUDPAddr(network, addr)
			u, _ = net.ListenUDP(network, ua)
		}
	})
	conn, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = conn.Write([]byte("hi"))
	if network == "tcp" {
		if peer, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		l.Close()
		return conn, peer
	}
	_, from, err := u.ReadFrom(make([]byte, 10))
	if err != nil {
		t.Fatal(err)
	}
	u.Close()
	la, _ := net.ResolveUDPAddr(network, addr)
	w.in(func() { peer, _ = net.DialUDP(network, la, from.(*net.UDPAddr)) })
	return conn, peer
}
