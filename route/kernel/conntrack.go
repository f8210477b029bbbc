package kernel

import (
	"errors"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxCleared bounds how many flows are asked to forget our mark: it is of use to nobody once we are gone.
const maxCleared = 1 << 16

// clearMarks takes our bits out of the marks of the flows that live on. Best effort.
func (h *Host) clearMarks() {
	m := h.c.Marks.Mask
	if m == 0 {
		return
	}
	ct, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return
	}
	defer ct.Close()
	n := 0
	for _, f := range h.families {
		flows, err := ct.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(f))
		if err != nil {
			continue
		}
		for _, flow := range flows {
			if flow.Mark&m == 0 {
				continue
			}
			if n++; n > maxCleared {
				return
			}
			only := &netlink.ConntrackFlow{FamilyType: flow.FamilyType, Forward: flow.Forward, Reverse: flow.Reverse, Mark: flow.Mark &^ m}
			_ = ct.ConntrackUpdate(netlink.ConntrackTable, netlink.InetFamily(f), only)
		}
	}
}

// Established lists the TCP connections that came in from outside to a listener of the calling thread's network
// namespace. A program that dials from the port that it listens on can't be told from one that is called.
func Established() ([]Tuple, error) {
	var out []Tuple
	type local struct {
		a    netip.Addr
		port uint16
	}
	listening := map[local]bool{}
	var all []Tuple
	for _, f := range []uint8{unix.AF_INET, unix.AF_INET6} {
		socks, err := netlink.SocketDiagTCP(f)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, err
		}
		for _, s := range socks {
			a, ok1 := netip.AddrFromSlice(s.ID.Source)
			b, ok2 := netip.AddrFromSlice(s.ID.Destination)
			if !ok1 || !ok2 {
				continue
			}
			a, b = a.Unmap(), b.Unmap()
			if s.State == netlink.TCP_LISTEN {
				if a.IsUnspecified() {
					a = netip.Addr{}
				}
				listening[local{a, s.ID.SourcePort}] = true
				continue
			}
			if a.IsLoopback() || b.IsLoopback() || s.State == netlink.TCP_SYN_SENT {
				continue
			}
			all = append(all, Tuple{unix.IPPROTO_TCP, netip.AddrPortFrom(a, s.ID.SourcePort), netip.AddrPortFrom(b, s.ID.DestinationPort)})
		}
	}
	for _, t := range all {
		if listening[local{netip.Addr{}, t.Local.Port()}] || listening[local{t.Local.Addr(), t.Local.Port()}] {
			out = append(out, t)
		}
	}
	return out, nil
}
