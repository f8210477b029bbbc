package hosttest

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// forge sends a datagram from a namespace with whatever source address.
func (w *world) forge(ns string, from, to netip.AddrPort) {
	w.t.Helper()
	w.in(ns, func() error {
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, forgedDatagram(from, to, []byte("forged")), 0, sockaddr(netip.AddrPortFrom(to.Addr(), 0)))
	})
}

// forgedDatagram has its IP header, and a checksum, which IPv6 insists on.
func forgedDatagram(from, to netip.AddrPort, payload []byte) []byte {
	u := binary.BigEndian.AppendUint16(nil, from.Port())
	u = binary.BigEndian.AppendUint16(u, to.Port())
	u = binary.BigEndian.AppendUint16(u, uint16(8+len(payload)))
	u = append(append(u, 0, 0), payload...)
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	pseudo := append(append([]byte(nil), src...), dst...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(u)))
	pseudo = append(binary.BigEndian.AppendUint32(pseudo, unix.IPPROTO_UDP), u...)
	binary.BigEndian.PutUint16(u[6:], ^sum(pseudo))
	if from.Addr().Is6() {
		h := []byte{0x60, 0, 0, 0, 0, byte(len(u)), unix.IPPROTO_UDP, 64}
		return append(append(append(h, src...), dst...), u...)
	}
	h := []byte{0x45, 0, 0, byte(20 + len(u)), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	h = append(append(h, src...), dst...)
	binary.BigEndian.PutUint16(h[10:], ^sum(h))
	return append(h, u...)
}

// TestForged: a datagram that seems to come from an address in the world, whoever of the LAN, the containers and the world
// has sent it, moves nothing that a program sends there past the proxy. It comes before the port is open, before the
// program's first datagram, between its datagrams, and after conntrack has forgotten them.
func TestForged(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.hostServers()
	w.proxy(proxy4 + ":1080")
	rec := newRecorder(w)
	rec.known(w.proxy(proxyB4 + ":1080"))
	rec.mu.Lock()
	rec.proxyTCP[netipAddrPort(proxy4, 1080)], rec.proxyUDP[addr(proxy4)] = true, true
	rec.mu.Unlock()
	w.up("--proxy", "socks5://"+proxy4+":1080", "--inbound-port", "9100-9199")
	next := 100
	for _, rp := range []string{"0", "1", "2"} {
		w.sysctl("host", map[string]string{
			"net/ipv4/conf/all/rp_filter": rp, "net/ipv4/conf/eth0/rp_filter": rp, "net/ipv4/conf/br0/rp_filter": rp,
			"net/netfilter/nf_conntrack_udp_timeout": "1", "net/netfilter/nf_conntrack_udp_timeout_stream": "1",
		})
		for _, v6 := range []bool{false, true} {
			if v6 && rp != "0" {
				continue // it is for IPv4
			}
			for _, ns := range []string{"router", "ctr", "world"} {
				t.Run(fmt.Sprintf("rp_filter %s, IPv6 %v, from %s", rp, v6, ns), func(t *testing.T) {
					next++
					a, b, host := netipAddrPort(
						fmt.Sprintf("203.0.113.%d", next),
						4000,
					), netipAddrPort(
						"203.0.113.99",
						4000,
					), addr(
						host4,
					)
					if v6 {
						a, b, host = netipAddrPort(
							fmt.Sprintf("2001:db8:f::%x", next),
							4000,
						), netipAddrPort(
							"2001:db8:f::99",
							4000,
						), addr(
							host6,
						)
					}
					port := uint16(6000 + next)
					forge := func() {
						w.forge(ns, a, netip.AddrPortFrom(host, port))
						testkit.Settle(2*time.Millisecond, "conntrack has it")
					}
					var c *net.UDPConn
					left := func(when string, to netip.AddrPort) bool {
						t.Helper()
						rec.take()
						if _, err := c.WriteToUDPAddrPort([]byte("own"), to); err != nil {
							t.Errorf("%s: %v", when, err)
						}
						testkit.Settle(20*time.Millisecond, "what leaves has left")
						return slices.ContainsFunc(
							rec.take(),
							func(s sighting) bool { return s.what.dst == to.Addr() && s.what.proto == unix.IPPROTO_UDP },
						)
					}
					send := func(when string, to netip.AddrPort) {
						t.Helper()
						if left(when, to) {
							t.Errorf("%s: it left the host", when)
						}
					}
					forge() // nobody is there
					c = w.packets("host", fmt.Sprintf(":%d", port))
					send("forged before the port was open", a)
					c.Close()

					port += 1000
					c = w.packets("host", fmt.Sprintf(":%d", port))
					forge()
					send("another address", b)
					send("forged before the first", a)
					for range 5 {
						forge()
						send("forged between", a)
					}
					testkit.Pace(2500 * time.Millisecond) // conntrack forgets the flow
					forge()
					send("forged after conntrack forgot", a)
					c.Close()

					port = uint16(
						9000 + next,
					) // the port of a server, by option: a datagram turns the flow to its sender, and no other
					c = w.packets("host", fmt.Sprintf(":%d", port))
					send("a server's port, of its own accord", a)
					send("a server's port, to another", b)
					w.eventually(
						testkit.Patience,
						"a server's port answers who seems to have asked",
						func() bool { forge(); return left("a server's port", a) },
					)
					send("a server's port, to another than who seems to have asked", b)
					c.Close()
				})
			}
		}
		if err := w.askUDP(client4, host4); err != nil {
			t.Errorf("rp_filter %s: a UDP server is not reached: %v", rp, err)
		}
		if err := w.askUDP(client6, host6); err != nil {
			t.Errorf("rp_filter %s: a UDP server is not reached by IPv6: %v", rp, err)
		}
	}
}
