package netns

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// setGateway names a gateway in the default route by the interface, for programs that look there for someone to ask for a
// port. The packets take the same way as without it, because a TUN has no link-layer addresses.
func setGateway(name string, gateway netip.Addr) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("cannot set the gateway of %s: %w", name, err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("cannot set the gateway of %s: %w", name, err)
	}
	everywhere := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	r := &netlink.Route{
		LinkIndex: link.Attrs().Index, Dst: ipNet(everywhere), Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
	}
	if err := h.RouteReplace(r); err != nil {
		return fmt.Errorf("cannot set the gateway of %s to %v: %w", name, gateway, err)
	}
	return nil
}
