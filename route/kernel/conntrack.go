package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// maxCleared limits how many flows lose our mark. Once we are gone, the mark has no use.
const maxCleared = 1 << 16

// Constants of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctUpdate, ctGet                                    = 0, 1
	ctaTupleOrig, ctaMark, ctaZone, ctaMarkMask uint16 = 1, 8, 18, 21
)

// clearMarks removes our bits from the marks of flows: those whose bits equal what, or all flows if what is 0. Errors
// are ignored. It returns each flow's own description to the kernel, whatever its protocol, because there are more
// kinds than TCP and UDP.
func (h *Host) clearMarks(what uint32) {
	m := h.c.Marks.Mask
	if m == 0 {
		return
	}
	n := 0
	for _, f := range h.families {
		list := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|ctGet, unix.NLM_F_DUMP)
		list.AddData(&nl.Nfgenmsg{NfgenFamily: uint8(f), Version: unix.NFNETLINK_V0})
		flows, err := list.Execute(unix.NETLINK_NETFILTER, 0)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		for _, flow := range flows {
			if len(flow) < nl.SizeofNfgenmsg {
				continue
			}
			a := attrs(flow[nl.SizeofNfgenmsg:])
			if len(a[ctaMark]) != 4 {
				continue
			}
			if bits := binary.BigEndian.Uint32(a[ctaMark]) & m; bits == 0 || what != 0 && bits != what {
				continue
			}
			if n++; n > maxCleared {
				return
			}
			change := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|ctUpdate, unix.NLM_F_ACK)
			change.AddData(&nl.Nfgenmsg{NfgenFamily: uint8(f), Version: unix.NFNETLINK_V0})
			change.AddRawData(nested(ctaTupleOrig, a[ctaTupleOrig]))
			if zone := a[ctaZone]; zone != nil {
				change.AddRawData(attr(ctaZone, zone))
			}
			change.AddRawData(cat(attrU32(ctaMark, 0), attrU32(ctaMarkMask, m)))
			_, _ = change.Execute(unix.NETLINK_NETFILTER, 0)
		}
	}
}

// Established lists connections of the calling thread's network namespace: TCP connections that came from outside to
// a listener, which will keep their direct answers, and connected UDP sockets that were opened here (Out), which will
// not, even if their far end speaks first. A program that dials from the TCP port on which it listens cannot be
// distinguished from one that was called, nor an unconnected UDP socket from a server.
func Established() ([]Tuple, error) {
	var out []Tuple
	listening := map[netip.AddrPort]bool{}
	ephemeral := firstEphemeral()
	for _, f := range []uint8{unix.AF_INET, unix.AF_INET6} {
		tcp, err := sockets(netlink.SocketDiagTCP(f))
		if err != nil {
			return nil, err
		}
		for _, s := range tcp {
			t, ok := tuple(unix.IPPROTO_TCP, s)
			switch {
			case !ok:
			case s.State == netlink.TCP_LISTEN:
				listening[anyAddr(t.Local)] = true
			case s.State != netlink.TCP_SYN_SENT && !t.Local.Addr().IsLoopback() && !t.Remote.Addr().IsLoopback():
				out = append(out, t)
			}
		}
	}
	n := 0
	for _, t := range out {
		if listening[netip.AddrPortFrom(netip.Addr{}, t.Local.Port())] || listening[t.Local] {
			out[n] = t
			n++
		}
	}
	out = out[:n]
	for _, f := range []uint8{unix.AF_INET, unix.AF_INET6} {
		udp, err := sockets(netlink.SocketDiagUDP(f))
		if err != nil {
			return nil, err
		}
		for _, s := range udp {
			t, ok := tuple(unix.IPPROTO_UDP, s)
			if ok && t.Remote.Port() != 0 && t.Local.Port() >= ephemeral && !t.Remote.Addr().IsLoopback() {
				t.Out = true
				out = append(out, t)
			}
		}
	}
	return out, nil
}

// sockets returns an empty list if the kernel lacks the family or its sock_diag.
func sockets(s []*netlink.Socket, err error) ([]*netlink.Socket, error) {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EINVAL) ||
		errors.Is(err, netlink.ErrDumpInterrupted) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list sockets: %w", err)
	}
	return s, nil
}

func tuple(proto uint8, s *netlink.Socket) (Tuple, bool) {
	a, ok1 := netip.AddrFromSlice(s.ID.Source)
	b, ok2 := netip.AddrFromSlice(s.ID.Destination)
	return Tuple{
			Proto:  proto,
			Local:  netip.AddrPortFrom(a.Unmap(), s.ID.SourcePort),
			Remote: netip.AddrPortFrom(b.Unmap(), s.ID.DestinationPort),
		}, ok1 &&
			ok2
}

// anyAddr maps the unspecified addresses to a single value.
func anyAddr(a netip.AddrPort) netip.AddrPort {
	if a.Addr().IsUnspecified() {
		return netip.AddrPortFrom(netip.Addr{}, a.Port())
	}
	return a
}

// firstEphemeral returns the first port that the kernel gives to sockets that did not ask for one.
func firstEphemeral() uint16 {
	var lo, hi uint16
	if _, err := fmt.Sscan(readSysctl("net/ipv4/ip_local_port_range"), &lo, &hi); err != nil {
		return 32768
	}
	return lo
}

// keep chooses among the connections that were open before. With CarryInbound, those from outside keep their direct
// answers only if this host's end has an address of an excluded device.
func (h *Host) keep() error {
	h.st.kept = h.c.Kept
	if !h.c.CarryInbound {
		return nil
	}
	spared := map[netip.Addr]bool{}
	for _, d := range h.c.Exclude.Devices {
		k, err := h.nl.LinkByName(d)
		if err != nil {
			continue // the device may not exist yet
		}
		addrs, err := h.nl.AddrList(k, netlink.FAMILY_ALL)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("cannot list the addresses of %s: %w", d, err)
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				spared[ip.Unmap()] = true
			}
		}
	}
	h.st.kept = nil
	for _, t := range h.c.Kept {
		if t.Out || spared[t.Local.Addr().Unmap().WithZone("")] {
			h.st.kept = append(h.st.kept, t)
		}
	}
	return nil
}
