package kernel

import (
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// timerRetransmit is the idiag_timer of a socket that retransmits unacknowledged data.
const timerRetransmit = 1

// ResetStale ends TCP connections that a dead daemon carried and that keep retransmitting unacknowledged data. Their
// timers back off, so their next retransmission could come after the host is opened again, and reach the real peer.
// It ends connections whose route leads into the TUN or nowhere, except those that came from outside. It does nothing
// if traffic is selected by something that a route look-up does not know, or if the kernel cannot destroy sockets. n
// is the number of connections that it ended.
func (h *Host) ResetStale() (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.c.Include.empty() || len(h.c.Exclude.Cgroups)+len(h.c.live)+len(h.c.Units) > 0 {
		return 0, nil
	}
	inbound, err := Established()
	if err == nil {
		inbound, err = h.withoutOpened(inbound)
	}
	if err != nil {
		return 0, err
	}
	index := 0
	if l, err := net.InterfaceByName(h.c.TUN); err == nil {
		index = l.Index
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := netlink.SocketDiagTCP(family)
		if err != nil {
			continue // the kernel lacks the family or sock_diag
		}
		for _, s := range all {
			local, ok1 := netip.AddrFromSlice(s.ID.Source)
			remote, ok2 := netip.AddrFromSlice(s.ID.Destination)
			if !ok1 || !ok2 || s.Timer != timerRetransmit || s.Retrans == 0 || s.State == netlink.TCP_SYN_SENT ||
				s.ID.Interface != 0 ||
				remote.IsLoopback() || h.c.Exclude.hasPort(s.ID.DestinationPort) ||
				slices.ContainsFunc(inbound, func(t Tuple) bool {
					return t.Local == netip.AddrPortFrom(local.Unmap(), s.ID.SourcePort) &&
						t.Remote == netip.AddrPortFrom(remote.Unmap(), s.ID.DestinationPort)
				}) || !leadsInto(s, local, index) {
				continue
			}
			switch err := destroy(s); {
			case err == nil:
				n++
			case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
				return n, nil // CONFIG_INET_DIAG_DESTROY is missing
			}
		}
	}
	return n, nil
}

func (s *Selection) hasPort(port uint16) bool {
	return slices.ContainsFunc(s.Ports, func(r PortRange) bool { return r.First <= port && port <= r.Last })
}

// leadsInto reports whether packets of s go to the device index, or nowhere.
func leadsInto(s *netlink.Socket, local netip.Addr, index int) bool {
	uid := s.UID
	routes, err := netlink.RouteGetWithOptions(
		s.ID.Destination,
		&netlink.RouteGetOptions{SrcAddr: local.Unmap().AsSlice(), UID: &uid},
	)
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return true
	}
	return err == nil && len(routes) > 0 && index != 0 && routes[0].LinkIndex == index
}

// destroyRequest is struct inet_diag_req_v2.
type destroyRequest struct {
	family uint8
	id     netlink.SocketID
}

func (r *destroyRequest) Len() int { return 56 }

func (r *destroyRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0], b[1] = r.family, unix.IPPROTO_TCP
	ports := b[8:12]
	ports[0], ports[1] = byte(r.id.SourcePort>>8), byte(r.id.SourcePort)
	ports[2], ports[3] = byte(r.id.DestinationPort>>8), byte(r.id.DestinationPort)
	src, dst := r.id.Source, r.id.Destination
	if r.family == unix.AF_INET {
		src, dst = src.To4(), dst.To4()
	}
	copy(b[12:28], src)
	copy(b[28:44], dst)
	nl.NativeEndian().PutUint32(b[44:], r.id.Interface)
	nl.NativeEndian().PutUint32(b[48:], r.id.Cookie[0])
	nl.NativeEndian().PutUint32(b[52:], r.id.Cookie[1])
	return b
}

// destroy ends a connection: its program sees ECONNABORTED. The cookie ensures that it is still the same connection.
func destroy(s *netlink.Socket) error {
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddData(&destroyRequest{s.Family, s.ID})
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}
