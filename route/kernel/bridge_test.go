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
	for _, call := range []string{"0", "1"} {
		for _, strict := range []bool{false, true} {
			t.Run(fmt.Sprintf("call-iptables %s, strict %v", call, strict), func(t *testing.T) {
				inNamespace(t, func(t *testing.T) { bridgedGuest(t, call, strict) })
			})
		}
	}
}

func bridgedGuest(t *testing.T, call string, strict bool) {
	x := hypervisor{t, newWorld(t), newWorldless(t)}
	c := testConfig(t)
	c.Strict = strict
	h, tun := up(t, c) // eth0 has a gateway now, and so stays a device that leads out
	x.bridge()
	showBridged(t, call)
	forwardAll(t)
	settled(t)
	var l net.Listener
	x.w.in(func() { l = tcpServer(t, "tcp", ":80") })
	defer l.Close()
	h.mu.Lock()
	_, err := h.reconcile()
	h.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	x.crosses("up")
	x.held("up")
	ip(t, "-4 rule flush protocol 118", "-6 rule flush protocol 118") // the filter holds alone
	x.held("without rules")
	h.Close()
	tun.Close()
	x.crosses("dead")
	if _, err := Undo(c); err != nil {
		t.Error(err)
	}
}

// hypervisor is a host whose guest and uplink share a bridge.
type hypervisor struct {
	t        *testing.T
	w, guest *world
}

// bridge moves the host's addresses to a bridge, with the uplink and the guest as its ports.
func (x *hypervisor) bridge() {
	x.t.Helper()
	ip(
		x.t,
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
		"link set geth netns "+x.guest.pid(),
	)
	x.guest.in(func() {
		ip(
			x.t,
			"link set lo up",
			"link set geth addrgenmode none up",
			"addr add 198.51.100.50/24 dev geth",
			"addr add 2001:db8:1::50/64 dev geth nodad",
			"route add default via 198.51.100.1",
			"route add default via 2001:db8:1::1",
		)
	})
}

// showBridged says whether the kernel shows the filter what only crosses a bridge. It skips the test where it cannot.
func showBridged(t *testing.T, call string) {
	t.Helper()
	const callIPTables = "net/bridge/bridge-nf-call-iptables"
	if _, err := os.Stat("/proc/sys/" + callIPTables); err == nil {
		setSysctls(t, call, callIPTables, "net/bridge/bridge-nf-call-ip6tables")
	} else if call == "1" {
		t.Skip("the kernel has no br_netfilter: ", err)
	}
}

// crosses wants the guest to reach the far end by the bridge.
func (x *hypervisor) crosses(when string) {
	x.t.Helper()
	for _, dst := range []string{far4, far6} {
		x.guest.in(func() {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(dst, "80"), testkit.Patience)
			if err == nil {
				if err = hello(c); err == nil {
					err = talk(c)
				}
				c.Close()
			}
			if err != nil {
				x.t.Errorf("%s: the guest to %s: %v", when, dst, err)
			}
		})
	}
}

// held wants nothing to leave the host, neither of the guest, which has it forward, nor of the host itself.
func (x *hypervisor) held(when string) {
	x.t.Helper()
	x.guest.in(func() {
		ip(x.t, "route add "+far4+"/32 via 198.51.100.2", "route add "+far6+"/128 via 2001:db8:1::2")
	})
	x.w.take()
	for _, dst := range []string{far4, far6} {
		x.guest.in(func() { _ = probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777}.send() })
		_ = probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777}.send()
		_ = probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777, bind: "brv"}.send()
	}
	if s := x.w.take(); len(s) > 0 {
		x.t.Errorf("%s: left the host: %v", when, s)
	}
	x.guest.in(func() { ip(x.t, "route del "+far4+"/32", "route del "+far6+"/128") })
}
