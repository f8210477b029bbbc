package kernel

import (
	"fmt"
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

// Connections from outside: open before (tracked by nobody), while up, after the daemon's death; and all of that with
// strict reverse path filtering. An excluded device changes nothing about them, and is not subject to CarryInbound.
func TestInbound(t *testing.T) {
	for _, tt := range []struct{ strict, exclude, carry bool }{
		{}, {strict: true}, {exclude: true}, {strict: true, exclude: true}, {exclude: true, carry: true},
	} {
		strict := tt.strict
		inNamespace(t, func(t *testing.T) {
			w := newWorld(t)
			if strict {
				for _, d := range []string{"all", "eth0", "default"} {
					if err := writeSysctl("net/ipv4/conf/"+d+"/rp_filter", "1"); err != nil {
						t.Fatal(err)
					}
				}
			}
			// The far end's addresses are on lo of the world: what comes from there is from outside, not on-link.
			w.in(func() {
				ip(
					t,
					"route replace 198.51.100.2/32 dev eth0p src "+far4,
					"-6 route replace 2001:db8:1::2/128 dev eth0p src "+far6,
				)
			})
			l := listenHere(t, ":2222")
			defer l.Close()
			u, err := net.ListenPacket("udp", ":2223")
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			go func() {
				b := make([]byte, 100)
				for {
					n, from, err := u.ReadFrom(b)
					if err != nil {
						return
					}
					_, _ = u.WriteTo(b[:n], from)
				}
			}()
			b4, b6 := w.dialIn(t, "tcp", "198.51.100.2:2222"), w.dialIn(t, "tcp", "[2001:db8:1::2]:2222")
			if b4 == nil || b6 == nil {
				return
			}
			defer b4.Close()
			defer b6.Close()
			if b4.LocalAddr().(*net.TCPAddr).IP.String() != far4 {
				t.Errorf("the client is at %v", b4.LocalAddr())
			}
			c := testConfig(t)
			c.Guard = time.Second
			c.CarryInbound = tt.carry
			if tt.exclude {
				c.Exclude.Devices = []string{"eth0"}
			}
			if c.Kept, err = Established(); err != nil || len(c.Kept) != 2 {
				t.Errorf("established: %v, %v", c.Kept, err)
			}
			h, tun := up(t, c)
			check := func(when string) {
				t.Helper()
				for _, c := range []net.Conn{b4, b6} {
					if err := talk(c); err != nil {
						t.Errorf("%s: connection of before, %v: %v", when, c.RemoteAddr(), err)
					}
				}
				for _, a := range []string{"198.51.100.2", "[2001:db8:1::2]"} {
					if c := w.dialIn(t, "tcp", a+":2222"); c != nil {
						if err := talk(c); err != nil {
							t.Errorf("%s: new connection to %s: %v", when, a, err)
						}
						c.Close()
					}
					w.in(func() {
						c, err := net.Dial("udp", a+":2223")
						if err == nil {
							err = talk(c)
							c.Close()
						}
						if err != nil {
							t.Errorf("%s: UDP to %s: %v", when, a, err)
						}
					})
				}
			}
			check(fmt.Sprintf("up, %+v", tt))
			h.Close() // as a kill does
			tun.Close()
			testkit.Pace(1100 * time.Millisecond) // the guard ends
			check(fmt.Sprintf("dead, %+v", tt))
			if !tt.exclude { // sockets that are bound to an excluded device go past the proxy
				w.mustBeClosed(t, "dead")
			} else if w.passes(false, probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777}.send) {
				t.Errorf("%+v: a datagram of a socket that is not bound to the device left", tt)
			}
			if _, err := Undo(c); err != nil {
				t.Error(err)
			}
			check("down")
			if strict && readSysctl(srcValidMark) != "0" {
				t.Error("src_valid_mark was not put back")
			}
		})
	}
}

// serverFirstCases are the cases of TestServerFirst.
var serverFirstCases = []struct {
	name    string
	carry   bool
	exclude string
	want    bool
}{
	{"keep", false, "", true},
	{"carry", true, "", false},
	{"carry, the device is excluded", true, "eth0", true},
	{"carry, another device is excluded", true, "br0", false},
}

// A server speaks first over connections that nobody had tracked before `up`. With CarryInbound only those that have an
// address of an excluded device are answered directly, also after the choice was changed.
func TestServerFirst(t *testing.T) {
	for _, tt := range serverFirstCases {
		for _, changed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, changed %v", tt.name, changed), func(t *testing.T) {
				inNamespace(t, func(t *testing.T) {
					w := newWorld(t)
					w.in(func() {
						ip(
							t,
							"route replace 198.51.100.2/32 dev eth0p src "+far4,
							"-6 route replace 2001:db8:1::2/128 dev eth0p src "+far6,
						)
					})
					l, err := net.Listen("tcp", ":2222")
					if err != nil {
						t.Fatal(err)
					}
					defer l.Close()
					var servers []net.Conn
					for _, host := range []string{"198.51.100.2:2222", "[2001:db8:1::2]:2222"} {
						var client net.Conn
						w.in(func() { client, err = net.Dial("tcp", host) })
						if err != nil {
							t.Fatal(err)
						}
						defer client.Close()
						in, err := l.Accept()
						if err != nil {
							t.Fatal(err)
						}
						defer in.Close()
						servers = append(servers, in)
					}
					c := testConfig(t)
					c.Kept, _ = Established()
					choice := c
					choice.CarryInbound = tt.carry
					if tt.exclude != "" {
						choice.Exclude.Devices = []string{tt.exclude}
					}
					if !changed {
						c = choice
					}
					h, tun := up(t, c)
					if changed {
						if err := h.Change(choice); err != nil {
							t.Fatal(err)
						}
					}
					for _, s := range servers {
						send := func() error { _, err := s.Write([]byte("hello")); return err }
						if got := w.passes(tt.want, send); got != tt.want {
							t.Errorf("to %v: left directly: %v, want %v", s.RemoteAddr(), got, tt.want)
						}
					}
					down(t, h)
					tun.Close()
				})
			})
		}
	}
}

// A container behind a bridge: its published port is reached, what it dials is captured or refused.
func TestContainer(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		k := newWorldless(t)
		ip(
			t,
			"link add docker0 type bridge",
			"link set docker0 addrgenmode none up",
			"link add vc type veth peer name ceth",
			"link set vc addrgenmode none master docker0 up",
			"link set ceth netns "+k.pid(),
			"addr add 172.17.0.1/16 dev docker0",
		)
		k.in(func() {
			ip(
				t,
				"link set lo up",
				"link set ceth addrgenmode none up",
				"addr add 172.17.0.2/16 dev ceth",
				"route add default via 172.17.0.1",
			)
		})
		_ = writeSysctl("net/ipv4/ip_forward", "1")
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
		if after := state(t); after != before {
			t.Errorf("not as it was:\n%s\n--- before\n%s", after, before)
		}
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
		var peers []net.Conn
		for _, n := range []string{"tcp", "udp"} {
			for _, a := range []string{far4 + ":79", "[" + far6 + "]:79"} {
				var conn, peer net.Conn
				var l net.Listener
				var u *net.UDPConn
				w.in(func() {
					if n == "tcp" {
						l, _ = net.Listen(n, a)
					} else {
						ua, _ := net.ResolveUDPAddr(n, a)
						u, _ = net.ListenUDP(n, ua)
					}
				})
				conn, err := net.Dial(n, a)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				_, _ = conn.Write([]byte("hi"))
				if n == "tcp" {
					if peer, err = l.Accept(); err != nil {
						t.Fatal(err)
					}
					l.Close()
				} else {
					b := make([]byte, 10)
					_, from, err := u.ReadFrom(b)
					if err != nil {
						t.Fatal(err)
					}
					u.Close()
					la, _ := net.ResolveUDPAddr(n, a)
					w.in(func() { peer, _ = net.DialUDP(n, la, from.(*net.UDPAddr)) })
				}
				defer peer.Close()
				peers = append(peers, peer, conn)
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
			for i := 0; i < len(peers); i += 2 {
				_, _ = peers[i].Write([]byte("talk"))
			}
			testkit.Pace(20 * time.Millisecond)
			for i := 1; i < len(peers); i += 2 {
				_, _ = peers[i].Write([]byte("answer"))
			}
		}
		if s := w.take(); len(s) > 0 {
			t.Errorf("goes on around us: %v", s)
		}
		down(t, h)
		tun.Close()
	})
}
