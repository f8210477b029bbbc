package kernel

import (
	"fmt"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// A hypervisor: the uplink and a guest are ports of one bridge, which has the host's address. The guest's frames only
// cross the bridge, and pass also where the kernel shows them to the filter. What the guest has this host forward does
// not pass, though it comes in and would go out by the same bridge.
func TestBridgedGuests(t *testing.T) {
	const callIPTables = "net/bridge/bridge-nf-call-iptables"
	for _, call := range []string{"0", "1"} {
		for _, strict := range []bool{false, true} {
			t.Run(fmt.Sprintf("call-iptables %s, strict %v", call, strict), func(t *testing.T) {
				inNamespace(t, func(t *testing.T) {
					w := newWorld(t)
					guest := newWorldless(t)
					c := testConfig(t)
					c.Strict = strict
					h, tun := up(t, c) // eth0 has a gateway now, and so stays a device that leads out
					ip(
						t,
						"addr flush dev eth0",
						"link add brv type bridge",
						"link set brv addrgenmode none up",
						"link set eth0 master brv",
						"addr add 198.51.100.2/24 dev brv",
						"addr add 2001:db8:1::2/64 dev brv nodad",
						"route add default via 198.51.100.1",
						"-6 route replace default via 2001:db8:1::1 dev brv",
						"link add vg type veth peer name geth",
						"link set vg addrgenmode none master brv up",
						"link set geth netns "+guest.pid(),
					)
					guest.in(func() {
						ip(
							t,
							"link set lo up",
							"link set geth addrgenmode none up",
							"addr add 198.51.100.50/24 dev geth",
							"addr add 2001:db8:1::50/64 dev geth nodad",
							"route add default via 198.51.100.1",
							"route add default via 2001:db8:1::1",
						)
					})
					if _, err := os.Stat("/proc/sys/" + callIPTables); err == nil {
						for _, k := range []string{callIPTables, "net/bridge/bridge-nf-call-ip6tables"} {
							if err := writeSysctl(k, call); err != nil {
								t.Fatal(err)
							}
						}
					} else if call == "1" {
						t.Skip("the kernel has no br_netfilter: ", err)
					}
					for _, k := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
						if err := writeSysctl(k, "1"); err != nil {
							t.Fatal(err)
						}
					}
					settled(t)
					var l net.Listener
					w.in(func() { l = tcpServer(t, "tcp", ":80") })
					defer l.Close()
					h.mu.Lock()
					_, err := h.reconcile()
					h.mu.Unlock()
					if err != nil {
						t.Fatal(err)
					}
					pass := func(when string) {
						t.Helper()
						for _, dst := range []string{far4, far6} {
							guest.in(func() {
								c, err := net.DialTimeout("tcp", net.JoinHostPort(dst, "80"), testkit.Patience)
								if err == nil {
									if err = hello(c); err == nil {
										err = talk(c)
									}
									c.Close()
								}
								if err != nil {
									t.Errorf("%s: the guest to %s: %v", when, dst, err)
								}
							})
						}
					}
					pass("up")
					held := func(when string) {
						t.Helper()
						guest.in(
							func() {
								ip(t, "route add "+far4+"/32 via 198.51.100.2", "route add "+far6+"/128 via 2001:db8:1::2")
							},
						)
						w.take()
						for _, dst := range []string{far4, far6} {
							guest.in(func() { _ = probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777}.send() })
							_ = probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777}.send()
							_ = probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777, bind: "brv"}.send()
						}
						if s := w.take(); len(s) > 0 {
							t.Errorf("%s: left the host: %v", when, s)
						}
						guest.in(func() { ip(t, "route del "+far4+"/32", "route del "+far6+"/128") })
					}
					held("up")
					ip(t, "-4 rule flush protocol 118", "-6 rule flush protocol 118") // the filter holds alone
					held("without rules")
					h.Close()
					tun.Close()
					pass("dead")
					if _, err := Undo(c); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}
