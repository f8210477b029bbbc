package kernel

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What lives on when we are gone has no mark of ours, whatever its protocol, even if it sends while we go.
func TestMarksCleared(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		newWorld(t)
		c := testConfig(t)
		c.Exclude.Networks = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
		h, tun := up(t, c)
		marked := func() (n, others int) {
			for _, f := range h.families {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(f))
				if err != nil {
					t.Fatal(err)
				}
				for _, x := range flows {
					if x.Mark&c.Marks.Mask != 0 {
						n++
						if x.Mark&^c.Marks.Mask != 0 {
							others++
						}
					}
				}
			}
			return n, others
		}
		nft(t, "add table inet foreign")
		nft(t, "add chain inet foreign o { type filter hook output priority 0; }")
		nft(t, "add rule inet foreign o ct mark set ct mark | 0x5")
		sends := func() error {
			for _, dst := range []string{far4, far6} {
				_ = probe{typ: unix.SOCK_DGRAM, dst: dst, port: 7777}.send() // at some steps there is no route
			}
			return nil
		}
		_ = sends()
		echo(t, far4)
		echo(t, far6)
		if n, others := marked(); n < 4 || others != n {
			t.Errorf("%d flows with our mark, %d with another's bits beside it: the test would prove nothing", n, others)
		}
		nft(t, "delete table inet foreign")
		defer func() { step = func() error { return nil } }()
		step = sends
		down(t, h)
		tun.Close()
		if n, _ := marked(); n != 0 {
			t.Errorf("%d flows have our mark still", n)
		}
	})
}

// echo sends an ICMP echo request.
func echo(t *testing.T, dst string) {
	t.Helper()
	family, proto, typ := unix.AF_INET, unix.IPPROTO_ICMP, byte(8)
	to := netip.MustParseAddr(dst)
	if to.Is6() {
		family, proto, typ = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, []byte{typ, 0, 0, 0, 0, 1, 0, 1}, 0, sockaddr(netip.AddrPortFrom(to, 0))); err != nil {
		t.Fatal(err)
	}
}
