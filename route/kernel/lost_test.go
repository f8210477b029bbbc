package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// answersToLostAddressCases are the cases of TestAnswersToLostAddress.
var answersToLostAddressCases = []struct {
	network, proxy, host string
	lose                 []string // on the host
	lead                 string   // in the world: the lost address is still behind the host
}{
	{"udp4", "198.51.100.8:1080", "198.51.100.2",
		[]string{"addr del 198.51.100.2/24 dev eth0", "route replace default via 10.1.1.1"},
		"route add 198.51.100.2/32 via 10.1.1.2"},
	{"udp6", "[2001:db8:1::7]:1080", "2001:db8:1::2",
		[]string{"addr del 2001:db8:1::2/64 dev eth0", "-6 route replace default via fe80::1 dev eth0"},
		"-6 route add 2001:db8:1::2/128 via fe80::2 dev eth0p"},
}

// A host that forwards has lost its address. It does not send the proxy's answers, which still come, back to the router.
func TestAnswersToLostAddress(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		forwardAll(t)
		w.in(func() { ip(t, "addr add 198.51.100.8/24 dev eth0p", "addr add 2001:db8:1::7/64 dev eth0p nodad") })
		h, tun := up(t, testConfig(t))
		forwarded := func() uint64 {
			counters, err := h.Counters()
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range counters {
				if c.Reason == countForward {
					return c.Packets
				}
			}
			return 0
		}
		for _, o := range answersToLostAddressCases {
			proxy := w.listenUDP(t, o.network, netip.MustParseAddrPort(o.proxy))
			if !w.passes(
				true,
				probe{
					typ:   unix.SOCK_DGRAM,
					dst:   netip.MustParseAddrPort(o.proxy).Addr().String(),
					port:  1080,
					sport: 5555,
					mark:  testConfig(t).Marks.Own,
				}.send,
			) {
				t.Fatalf("%s: our own socket does not reach the proxy", o.network)
			}
			ip(t, o.lose...)
			w.in(func() { ip(t, o.lead) })
			settled(t)
			before := forwarded()
			testkit.Eventually(t, fmt.Sprintf("%s: an answer that is refused", o.network), func() bool {
				w.take()
				if _, err := proxy.WriteTo([]byte("answer"),
					net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(o.host), 5555))); err != nil {
					t.Fatal(err)
				}
				if n := w.take()["17 "+o.host]; n > 0 {
					t.Fatalf("%s: the host sent the answer back, seen %d times", o.network, n)
				}
				return forwarded() > before
			})
			proxy.Close()
		}
		down(t, h)
		tun.Close()
	})
}

// What comes out of the TUN for an address that this host has just lost is not sent to the router either: it is data of this
// host's programs. The ip rule of the private network is still there, until the watch notices.
func TestCarriedToLostAddress(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		setSysctls(t, "1", "net/ipv4/ip_forward")
		h, tun := up(t, testConfig(t))
		lost, far := netip.MustParseAddrPort("10.1.1.2:5555"), netip.AddrPortFrom(netip.MustParseAddr(far4), 7777)
		conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(lost))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.WriteTo([]byte("ask"), net.UDPAddrFromAddrPort(far)); err != nil {
			t.Fatal(err)
		}
		if !answerFromTUN(t, int(fd(tun)), far4) {
			t.Fatal("what the host sends does not come to the TUN")
		}
		ip(t, "addr del 10.1.1.2/24 dev eth0")
		answer := func() error { _, err := tun.Write(datagram(far, lost)); return err }
		if w.passes(false, answer) {
			t.Error("the answer left the host")
		}
		down(t, h)
		tun.Close()
	})
}
