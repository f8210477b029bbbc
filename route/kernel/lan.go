package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// private are the networks that no proxy can reach, so the host keeps reaching those that it is connected to
// directly: RFC 1918, RFC 3927, RFC 4193 and link-local. Nothing else is ever exempt: the prefix on a device comes
// from a DHCP server or a router, and any of them could announce 0.0.0.0/1.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("fe80::/10"),
}

// maxLAN limits the rules for private networks, because each is checked at each route look-up of the host. A host
// with a bridge for each network of its containers has a few dozen.
const maxLAN = 128

// connected returns the private prefix of an address on a device. An address that is the host's alone (/32, /128)
// needs no rule, because the kernel's local table comes first.
func connected(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	a = a.Unmap()
	if ones == a.BitLen() {
		return netip.Prefix{}, false
	}
	p, err := a.Prefix(ones)
	if err != nil {
		return netip.Prefix{}, false
	}
	return p, slices.ContainsFunc(private, func(q netip.Prefix) bool { return q.Bits() <= p.Bits() && q.Contains(p.Addr()) })
}

// links is the current state of the host's devices.
type links struct {
	lan  []lanNet
	near []lanNet // IPv4 networks, private or not
	out  []string // devices that may lead out of the host, by name
	mine int      // index of the TUN; 0: it does not exist
}

// see stores what the filter needs to know about the devices.
func (s *filterState) see(l links) { s.lan, s.near, s.devices = l.lan, l.near, l.out }

// look reads devices, addresses and default routes.
func (h *Host) look() (l links, err error) {
	list, err := h.nl.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // the list changed meanwhile, and an event will follow
		return l, fmt.Errorf("cannot list devices: %w", err)
	}
	if err := h.lookGateways(); err != nil {
		return l, err
	}
	names, guest := map[int]string{}, map[int]bool{} // of all devices except the TUN and lo
	serves := served(list, h.led)
	for _, k := range list {
		a := k.Attrs()
		names[a.Index] = a.Name
		switch {
		case a.Name == h.c.TUN:
			l.mine = a.Index
		case a.Flags&net.FlagLoopback == 0:
			guest[a.Index] = serves[a.Index]
		}
	}
	for i, n := range names {
		if g, ok := guest[i]; ok && !g {
			l.out = append(l.out, n)
		}
	}
	slices.Sort(l.out)
	if err := h.lookNetworks(&l, names, guest); err != nil {
		return l, err
	}
	return l, nil
}

// lookGateways records in h.led which devices have a gateway. A device that has, or has had, one leads out whatever its kind;
// a link that goes down loses its routes.
func (h *Host) lookGateways() error {
	for _, f := range h.families {
		routes, err := h.nl.RouteListFiltered(f, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("cannot list kernel routes: %w", err)
		}
		for _, r := range routes {
			if ones, _ := maskOf(r.Dst); len(r.Gw) > 0 || ones == 0 {
				h.led[r.LinkIndex] = true
			}
			for _, hop := range r.MultiPath {
				h.led[hop.LinkIndex] = true
			}
		}
	}
	return nil
}

// lookNetworks reads the networks that the devices are connected to. names are the devices, and guest those of them except
// the TUN and lo, with whether they lead only to containers and guests.
func (h *Host) lookNetworks(l *links, names map[int]string, guest map[int]bool) error {
	addrs, err := h.nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("cannot list addresses: %w", err)
	}
	seen := map[lanNet]bool{}
	for _, a := range addrs {
		n := a.IPNet
		if a.Peer != nil {
			n = a.Peer // the network is that of the peer, and the address stands alone
		}
		p, ok := connected(n)
		dev := names[a.LinkIndex]
		g, known := guest[a.LinkIndex]
		ln := lanNet{dev: dev, prefix: p, guest: g && h.c.exempt(dev, p)}
		if known && p.IsValid() && p.Addr().Is4() && len(l.near) < maxLAN && !slices.Contains(l.near, ln) {
			l.near = append(l.near, ln)
		}
		if !ok || !known || seen[ln] {
			continue
		}
		seen[ln] = true
		l.lan = append(l.lan, ln)
	}
	sortNets(l.near)
	sortNets(l.lan)
	if len(l.lan) > maxLAN {
		h.say(
			"too many private networks",
			"too many private networks: the rest goes through the proxy",
			"limit",
			maxLAN,
			"first_left_out",
			l.lan[maxLAN].prefix,
		)
		l.lan = l.lan[:maxLAN]
	}
	return nil
}

// sortNets puts those of guests first: where networks overlap, the first one counts.
func sortNets(nets []lanNet) {
	sort.Slice(nets, func(i, j int) bool {
		a, b := nets[i], nets[j]
		if a.guest != b.guest {
			return a.guest
		}
		return a.prefix.String()+a.dev < b.prefix.String()+b.dev
	})
}

func maskOf(n *net.IPNet) (ones, bits int) {
	if n == nil {
		return 0, 0
	}
	return n.Mask.Size()
}

// isRouter reports whether the host forwards IPv6, and thus may send router advertisements.
func isRouter() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/forwarding")
	return err == nil && len(b) > 0 && b[0] == '1'
}

// strictReversePath returns the devices on which rp_filter=1 drops packets whose source it cannot explain.
func strictReversePath(tun string) (devices []string) {
	all := readSysctl("net/ipv4/conf/all/rp_filter")
	dirs, _ := filepath.Glob("/proc/sys/net/ipv4/conf/*")
	for _, d := range dirs {
		switch dev := filepath.Base(d); dev {
		case "all", "default", "lo", tun:
		default:
			if max(all, readSysctl("net/ipv4/conf/"+dev+"/rp_filter")) == "1" { // the larger of the two is in force
				devices = append(devices, dev)
			}
		}
	}
	return devices
}
