package kernel

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// served finds the devices that lead only to containers and guests of this host: a veth whose peer is in another
// network namespace, and a bridge whose ports are all such veths or TAP devices. A device that has a gateway leads
// elsewhere. All other devices may be real networks and are treated so: a dummy, a TUN device of a VPN, the parent of
// a macvlan, a bridge with any other kind of port.
//
// Inside a container, the veth to the outside looks the same, and its networks belong to others. It is recognized
// because it leads out: a veth counts as serving guests only if another kind of device leads out.
func served(list []netlink.Link, leads map[int]bool) map[int]bool {
	guestEnd := func(k netlink.Link) bool {
		switch d := k.(type) {
		case *netlink.Veth:
			return k.Attrs().NetNsID >= 0
		case *netlink.Tuntap:
			return d.Mode == netlink.TUNTAP_MODE_TAP
		}
		return false
	}
	uplink, container := false, false
	ports := map[int][]netlink.Link{}
	for _, k := range list {
		a := k.Attrs()
		if a.MasterIndex != 0 {
			ports[a.MasterIndex] = append(ports[a.MasterIndex], k)
		}
		if leads[a.Index] {
			uplink = true
			container = container || k.Type() == "veth" && guestEnd(k)
		}
	}
	out := map[int]bool{}
	for _, k := range list {
		a := k.Attrs()
		switch {
		case leads[a.Index]:
		case k.Type() == "veth":
			out[a.Index] = guestEnd(k) && (a.MasterIndex != 0 || uplink && !container)
		case k.Type() == "bridge":
			out[a.Index] = !slices.ContainsFunc(ports[a.Index], func(p netlink.Link) bool {
				return !guestEnd(p) || leads[p.Attrs().Index]
			})
		case k.Type() == "tuntap":
			out[a.Index] = guestEnd(k) && a.MasterIndex != 0
		}
	}
	return out
}

// exempt reports whether a network that this host serves stays reachable directly whatever the LANMode. It does,
// unless Strict is set or the user has named its device or network.
func (c *Config) exempt(dev string, p netip.Prefix) bool {
	return !c.Strict && !slices.Contains(c.Include.Devices, dev) && !slices.Contains(c.Exclude.Devices, dev) &&
		len(c.includedIn(p)) == 0
}

// includedIn returns the networks of Include that contain p or lie in it. They go through the proxy even where
// private networks do not.
func (c *Config) includedIn(p netip.Prefix) (out []netip.Prefix) {
	for _, n := range c.Include.Networks {
		if n.Overlaps(p) {
			out = append(out, n.Masked())
		}
	}
	return out
}

// included returns those of all private networks that the host is connected to, without duplicates.
func (c *Config) included(lan []lanNet) (out []netip.Prefix) {
	for _, n := range lan {
		for _, p := range c.includedIn(n.prefix) {
			if !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}

// answered returns the private networks, without duplicates, that need their own rule for packets out of the TUN:
// answers to containers, guests and neighbours that use this host as their router. Later rules would lead them back
// into the TUN, or refuse them, if the network is not reached directly. No router forwards to link-local addresses.
func (c *Config) answered(lan []lanNet) (out []netip.Prefix) {
	for _, n := range lan {
		direct := n.guest || c.LAN == LANDirect && len(c.includedIn(n.prefix)) == 0
		// several devices may have the same network
		if !direct && !n.prefix.Addr().IsLinkLocalUnicast() && !slices.Contains(out, n.prefix) {
			out = append(out, n.prefix)
		}
	}
	return out
}

// direct returns the private networks that are reached past the proxy, with their devices.
func (c *Config) direct(lan []lanNet) (out []string) {
	for _, n := range lan {
		switch {
		case n.guest && c.LAN != LANDirect:
			out = append(out, n.prefix.String()+" by "+n.dev+" (containers and guests of this host)")
		case c.LAN == LANDirect && !slices.ContainsFunc(c.includedIn(n.prefix), func(p netip.Prefix) bool {
			return p.Bits() <= n.prefix.Bits()
		}):
			out = append(out, n.prefix.String()+" by "+n.dev)
		}
	}
	return out
}

// PrivateDirect returns the private networks that are reached past the proxy, with their devices.
func (h *Host) PrivateDirect() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.c.direct(h.st.lan)
}

// tellServed logs changes of the networks that are reached directly although private networks are not.
func (h *Host) tellServed() {
	if h.c.LAN == LANDirect {
		return
	}
	nets := strings.Join(h.c.direct(h.st.lan), ", ")
	if h.said["served"] == nets {
		return
	}
	h.said["served"] = nets
	if nets == "" {
		nets = "none any more"
	}
	h.c.Log.Info("networks that this host serves are reached without the proxy: --strict prevents this", "networks", nets)
}
