package kernel

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// device is one for tests; peer: a veth's is in another network namespace.
func device(index int, kind string, master int, peer bool) netlink.Link {
	a := netlink.LinkAttrs{Index: index, Name: fmt.Sprint(kind, index), MasterIndex: master, NetNsID: -1}
	if peer {
		a.NetNsID = 0
	}
	switch kind {
	case "veth":
		return &netlink.Veth{LinkAttrs: a}
	case "tap":
		return &netlink.Tuntap{LinkAttrs: a, Mode: netlink.TUNTAP_MODE_TAP}
	case "tun":
		return &netlink.Tuntap{LinkAttrs: a, Mode: netlink.TUNTAP_MODE_TUN}
	case "bridge":
		return &netlink.Bridge{LinkAttrs: a}
	case "dummy":
		return &netlink.Dummy{LinkAttrs: a}
	}
	return &netlink.GenericLink{LinkAttrs: a, LinkType: kind}
}

func TestServed(t *testing.T) {
	eth := device(1, "device", 0, false)
	veth := func(i, master int) netlink.Link { return device(i, "veth", master, true) }
	for _, tt := range []struct {
		name  string
		list  []netlink.Link
		leads []int
		want  []int // of index 2
	}{
		{"a bridge of containers", []netlink.Link{eth, device(2, "bridge", 0, false), veth(3, 2)}, []int{1}, []int{2, 3}},
		{"a bridge of a guest", []netlink.Link{eth, device(2, "bridge", 0, false), device(3, "tap", 2, false)}, []int{1},
			[]int{2, 3}},
		{"a bridge of nobody", []netlink.Link{eth, device(2, "bridge", 0, false)}, []int{1}, []int{2}},
		{"a bridge with the uplink", []netlink.Link{device(1, "device", 2, false), device(2, "bridge", 0, false), veth(3, 2)},
			[]int{2}, []int{3}},
		{"a bridge with a port that leads out", []netlink.Link{eth, device(2, "bridge", 0, false), device(3, "device", 2, false),
			veth(4, 2)}, []int{1}, []int{4}},
		{"a bridge with a vlan", []netlink.Link{eth, device(2, "bridge", 0, false), device(3, "vlan", 2, false)}, []int{1}, nil},
		{"a bridge with a tunnel", []netlink.Link{eth, device(2, "bridge", 0, false), device(3, "vxlan", 2, false)}, []int{1},
			nil},
		{"a bridge with a veth of this namespace", []netlink.Link{eth, device(2, "bridge", 0, false),
			device(3, "veth", 2, false)}, []int{1}, nil},
		{"a bridge with a gateway behind it", []netlink.Link{eth, device(2, "bridge", 0, false), veth(3, 2)}, []int{1, 2},
			[]int{3}},
		{"a veth to a container", []netlink.Link{eth, veth(2, 0)}, []int{1}, []int{2}},
		{"a veth with a gateway", []netlink.Link{eth, veth(2, 0)}, []int{1, 2}, nil},
		{"a veth of this namespace", []netlink.Link{eth, device(2, "veth", 0, false)}, []int{1}, nil},
		{"a container's second network", []netlink.Link{veth(1, 0), veth(2, 0)}, []int{1}, nil},
		{"a container's only network", []netlink.Link{veth(1, 0)}, nil, nil},
		{"a container with containers of its own", []netlink.Link{veth(1, 0), device(2, "bridge", 0, false), veth(3, 2)},
			[]int{1}, []int{2, 3}},
		{"a VPN that has no gateway", []netlink.Link{eth, device(2, "tun", 0, false)}, []int{1}, nil},
		{"a tap of its own", []netlink.Link{eth, device(2, "tap", 0, false)}, []int{1}, nil},
		{"a dummy", []netlink.Link{eth, device(2, "dummy", 0, false)}, []int{1}, nil},
		{"wireguard", []netlink.Link{eth, device(2, "wireguard", 0, false)}, []int{1}, nil},
		{"a macvlan on a dummy", []netlink.Link{eth, device(2, "dummy", 0, false), device(3, "macvlan", 0, false)}, []int{1},
			nil},
		{"a macvlan on a bridge's port", []netlink.Link{eth, device(2, "bridge", 0, false), device(3, "macvlan", 2, false)},
			[]int{1}, nil},
	} {
		leads := map[int]bool{}
		for _, i := range tt.leads {
			leads[i] = true
		}
		got := served(tt.list, leads)
		maps.DeleteFunc(got, func(_ int, is bool) bool { return !is })
		if have := slices.Sorted(maps.Keys(got)); !slices.Equal(have, tt.want) {
			t.Errorf("%s: served %v, want %v", tt.name, have, tt.want)
		}
	}
}

// devices are kinds of networks that look as if they were this host's own, with and without a gateway route. The other end
// of the veths is the world's.
var devices = []struct {
	name, dev, net string
	make           func(t *testing.T, w *world) string // why it can't be had
}{
	{"veth", "second", "10.2.0", func(t *testing.T, w *world) string {
		ip(t, "link add second type veth peer name secondp", "link set secondp netns "+w.pid())
		w.in(func() { ip(t, "link set secondp addrgenmode none up") })
		return ""
	}},
	{"tun", "vpn0", "10.3.0", func(t *testing.T, _ *world) string { ip(t, "tuntap add dev vpn0 mode tun"); return "" }},
	{"tap", "vpn1", "10.4.0", func(t *testing.T, _ *world) string { ip(t, "tuntap add dev vpn1 mode tap"); return "" }},
	{"dummy", "dummy7", "10.5.0", func(t *testing.T, _ *world) string { return tryLink("link add dummy7 type dummy") }},
	{"macvlan parent", "dummy8", "10.6.0", func(t *testing.T, _ *world) string {
		if why := tryLink("link add dummy8 type dummy"); why != "" {
			return why
		}
		return tryLink("link add link dummy8 name mac0 type macvlan")
	}},
	{"bridge with a veth of this namespace", "br7", "10.7.0", func(t *testing.T, _ *world) string {
		ip(
			t,
			"link add br7 type bridge",
			"link add v7 type veth peer name v7p",
			"link set v7 addrgenmode none master br7 up",
			"link set v7p addrgenmode none up",
		)
		return ""
	}},
}

// tryLink makes a device of a kind that the kernel may lack.
func tryLink(line string) string {
	if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
		return "the kernel has no such device: " + string(out)
	}
	return ""
}

// Networks on virtual devices are private networks like others: what the options say holds for them.
func TestVirtualNetworks(t *testing.T) {
	for _, gateway := range []bool{false, true} {
		for _, d := range devices {
			t.Run(fmt.Sprintf("%s, gateway %v", d.name, gateway), func(t *testing.T) {
				inNamespace(t, func(t *testing.T) {
					w := newWorld(t)
					if why := d.make(t, w); why != "" {
						t.Skip(why)
					}
					ip(t, "link set "+d.dev+" addrgenmode none up", "addr add "+d.net+".2/24 dev "+d.dev)
					if d.name != "tun" {
						ip(t, "neigh replace "+d.net+".9 lladdr 02:00:00:00:00:09 nud permanent dev "+d.dev)
					}
					if gateway {
						ip(t, "route add 10.200.0.0/16 via "+d.net+".1 dev "+d.dev+" onlink")
					}
					for _, o := range []struct {
						name string
						set  func(*Config)
						want bool
					}{
						{"lan direct", func(c *Config) {}, true},
						{"lan carry", func(c *Config) { c.LAN = LANCarry }, false},
						{"lan refuse", func(c *Config) { c.LAN = LANRefuse }, false},
						{"strict", func(c *Config) { c.Strict = true }, false},
						{"lan refuse, strict", func(c *Config) { c.LAN, c.Strict = LANRefuse, true }, false},
						{"lan carry, strict", func(c *Config) { c.LAN, c.Strict = LANCarry, true }, false},
						{"include", func(c *Config) {
							c.Include.Networks = []netip.Prefix{netip.MustParsePrefix(d.net + ".0/24")}
						}, false},
						{"include a part", func(c *Config) {
							c.Include.Networks = []netip.Prefix{netip.MustParsePrefix(d.net + ".9/32")}
						}, false},
					} {
						c := testConfig(t)
						o.set(&c)
						h, tun := up(t, c)
						for _, bind := range []string{"", d.dev} {
							var got bool
							var err error
							for range 5 { // the kernel's own reports of multicast groups leave by the device now and then
								before := sent(t, d.dev)
								err = (probe{typ: unix.SOCK_DGRAM, dst: d.net + ".9", port: 7777, bind: bind}).send()
								testkit.Settle(20*time.Millisecond, "the device counts it")
								if got = sent(t, d.dev) != before; got == o.want {
									break
								}
							}
							if got != o.want {
								t.Errorf("%s, bound to %q: left by the device: %v (%v), want %v", o.name, bind, got, err, o.want)
							}
						}
						down(t, h)
						tun.Close()
					}
				})
			})
		}
	}
}

// sent is how many packets left by a device, or were dropped there because nobody reads it.
func sent(t *testing.T, dev string) uint64 {
	t.Helper()
	k, err := netlink.LinkByName(dev)
	if err != nil {
		t.Fatal(err)
	}
	s := k.Attrs().Statistics
	return s.TxPackets + s.TxDropped + s.TxErrors
}

// strictContainerCases are the cases of TestStrictContainer.
var strictContainerCases = []struct {
	name   string
	set    func(*Config)
	direct bool
}{
	{"lan refuse", func(c *Config) { c.LAN = LANRefuse }, true},
	{"lan carry", func(c *Config) { c.LAN = LANCarry }, true},
	{"lan refuse, strict", func(c *Config) { c.LAN, c.Strict = LANRefuse, true }, false},
	{"lan refuse, its network included", func(c *Config) {
		c.LAN, c.Include.Networks = LANRefuse, []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16"),
			netip.MustParsePrefix("203.0.113.0/24")}
	}, false},
	{"lan refuse, its device included", func(c *Config) {
		c.LAN, c.Include.Devices = LANRefuse, []string{"docker0"}
	}, false},
}

// With strict a network of this host's own containers has no direct way either, but what is carried for a container comes
// to it.
func TestStrictContainer(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		k := newContainer(t)
		settled(t)
		for _, o := range strictContainerCases {
			c := testConfig(t)
			o.set(&c)
			h, tun := up(t, c)
			listed := strings.Join(h.PrivateDirect(), "; ")
			if strings.Contains(listed, "172.17.0.0/16 by docker0") != o.direct {
				t.Errorf("%s: listed: %q", o.name, listed)
			}
			var l *net.UDPConn
			k.in(func() { l, _ = net.ListenUDP("udp4", &net.UDPAddr{Port: 5555}) })
			heard := func() bool {
				_ = l.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				_, _, err := l.ReadFrom(make([]byte, 100))
				return err == nil
			}
			_ = (probe{typ: unix.SOCK_DGRAM, dst: "172.17.0.2", port: 5555}).send()
			if got := heard(); got != o.direct {
				t.Errorf("%s: from the host to its container: %v, want %v", o.name, got, o.direct)
			}
			if _, err := l.WriteTo([]byte("ask"), &net.UDPAddr{IP: net.ParseIP(far4), Port: 7777}); err != nil {
				t.Error(err)
			}
			if !answerFromTUN(t, int(fd(tun)), far4) || !heard() {
				t.Errorf("%s: what is carried does not come back to the container", o.name)
			}
			if s := w.take(); len(s) > 0 {
				t.Errorf("%s: left the host: %v", o.name, s)
			}
			l.Close()
			down(t, h)
			tun.Close()
		}
	})
}

// answerFromTUN waits for a datagram to an address in the TUN, and answers it.
func answerFromTUN(t *testing.T, tun int, dst string) bool {
	t.Helper()
	want := netip.MustParseAddr(dst)
	b := make([]byte, 2000)
	for end := time.Now().Add(testkit.Patience); time.Now().Before(end); {
		var n int
		var err error
		if !testkit.Until(time.Until(end), func() bool { n, err = unix.Read(tun, b); return err == nil }) {
			break
		}
		head, proto, at, size := 20, 9, 12, 4
		if b[0]>>4 == 6 {
			head, proto, at, size = 40, 6, 8, 16
		}
		if n < head+8 || b[proto] != unix.IPPROTO_UDP {
			continue
		}
		src, _ := netip.AddrFromSlice(b[at : at+size])
		if to, _ := netip.AddrFromSlice(b[at+size : at+2*size]); to != want {
			continue
		}
		from := netip.AddrPortFrom(want, binary.BigEndian.Uint16(b[head+2:]))
		_, err = unix.Write(tun, datagram(from, netip.AddrPortFrom(src, binary.BigEndian.Uint16(b[head:]))))
		return err == nil
	}
	return false
}

// datagram is one with its IP header, as it comes out of the TUN.
func datagram(from, to netip.AddrPort) []byte {
	u := binary.BigEndian.AppendUint16(nil, from.Port())
	u = binary.BigEndian.AppendUint16(u, to.Port())
	u = append(u, 0, 12, 0, 0, 'b', 'a', 'c', 'k')
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	if from.Addr().Is4() { // needs no checksum of UDP
		h := append(append([]byte{0x45, 0, 0, byte(20 + len(u)), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, src...), dst...)
		binary.BigEndian.PutUint16(h[10:], ^sum(h))
		return append(h, u...)
	}
	pseudo := binary.BigEndian.AppendUint32(append(append([]byte(nil), src...), dst...), uint32(len(u)))
	binary.BigEndian.PutUint16(u[6:], ^sum(append(append(pseudo, 0, 0, 0, unix.IPPROTO_UDP), u...)))
	return append(append(append([]byte{0x60, 0, 0, 0, 0, byte(len(u)), unix.IPPROTO_UDP, 64}, src...), dst...), u...)
}

// sum is the Internet checksum of an even number of bytes, before it is inverted.
func sum(b []byte) uint16 {
	n := uint32(0)
	for ; len(b) > 1; b = b[2:] {
		n += uint32(binary.BigEndian.Uint16(b))
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}
