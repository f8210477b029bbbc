package hosttest

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

func level(p *probe, v4, v6 int) (int, int) {
	if p.v6 {
		return unix.IPPROTO_IPV6, v6
	}
	return unix.IPPROTO_IP, v4
}

// toDevice is SO_BINDTODEVICE.
func toDevice(name string) option {
	return func(_ *gun, _ *probe, fd int) error { return unix.BindToDevice(fd, name) }
}

// fromAddr binds to an address of the host, and a port if it is not 0.
func fromAddr(v4, v6 string, port uint16) option {
	return func(_ *gun, p *probe, fd int) error {
		a := v4
		if p.v6 {
			a = v6
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		return unix.Bind(fd, sockaddr(netip.AddrPortFrom(addr(a), port)))
	}
}

// fromPort binds to a port.
func fromPort(port uint16) option { return fromAddr("0.0.0.0", "::", port) }

// byIndex is IP_UNICAST_IF: the device for packets to one destination, as systemd-resolved sets it.
func byIndex(g *gun, p *probe, fd int) error {
	const ipUnicastIF, ipv6UnicastIF = 50, 76
	l, o := level(p, ipUnicastIF, ipv6UnicastIF)
	n := binary.NativeEndian.Uint32(binary.BigEndian.AppendUint32(nil, uint32(g.eth0))) // network byte order
	return unix.SetsockoptInt(fd, l, o, int(n))
}

// multicastBy is IP_MULTICAST_IF with the uplink.
func multicastBy(g *gun, p *probe, fd int) error {
	if p.v6 {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, g.eth0)
	}
	return unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(g.eth0)})
}

func hops(n int) option {
	return func(_ *gun, p *probe, fd int) error {
		l, o := level(p, unix.IP_MULTICAST_TTL, unix.IPV6_MULTICAST_HOPS)
		if err := unix.SetsockoptInt(fd, l, o, n); err != nil {
			return err
		}
		l, o = level(p, unix.IP_TTL, unix.IPV6_UNICAST_HOPS)
		return unix.SetsockoptInt(fd, l, o, n)
	}
}

func broadcast(_ *gun, _ *probe, fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
}

// marked is SO_MARK.
func marked(n int) option {
	return func(_ *gun, _ *probe, fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, n) }
}

// noDevice undoes toDevice: systemd-resolved connects a bound socket and frees it then.
func noDevice(_ *gun, _ *probe, fd int) error { return unix.BindToDevice(fd, "") }

// mayFragment lets a datagram be larger than the path's MTU.
func mayFragment(_ *gun, p *probe, fd int) error {
	l, o := level(p, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER)
	return unix.SetsockoptInt(fd, l, o, unix.IP_PMTUDISC_DONT)
}

// headerIncluded sends a UDP datagram with a header of its own making, from an address that is not the host's.
func headerIncluded(g *gun, p *probe, b []byte) error {
	fd, err := g.socket(p.v6, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	g.keep(fd)
	return unix.Sendto(fd, ipPacket(p, b), 0, sockaddr(netip.AddrPortFrom(p.to.Addr(), 0)))
}

// ipPacket is a UDP datagram with its IP header.
func ipPacket(p *probe, payload []byte) []byte {
	u := binary.BigEndian.AppendUint16(nil, 5000)
	u = binary.BigEndian.AppendUint16(u, p.to.Port())
	u = binary.BigEndian.AppendUint16(u, uint16(8+len(payload)))
	u = append(append(u, 0, 0), payload...)
	if p.v6 {
		h := []byte{0x60, 0, 0, 0, 0, byte(len(u)), unix.IPPROTO_UDP, 64}
		src, dst := addr("2001:db8:1::99").As16(), p.to.Addr().As16()
		return append(append(append(h, src[:]...), dst[:]...), u...)
	}
	h := []byte{0x45, 0, 0, byte(20 + len(u)), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	src, dst := addr("198.51.100.99").As4(), p.to.Addr().As4()
	h = append(append(h, src[:]...), dst[:]...)
	binary.BigEndian.PutUint16(h[10:], ^sum(h))
	return append(h, u...)
}

// sum is the Internet checksum's sum of an even number of bytes.
func sum(b []byte) uint16 {
	var n uint32
	for ; len(b) >= 2; b = b[2:] {
		n += uint32(binary.BigEndian.Uint16(b))
	}
	n = n>>16 + n&0xffff
	return uint16(n + n>>16)
}

// packetSocket sends a frame by AF_PACKET, below everything that has rules.
func packetSocket(g *gun, p *probe, b []byte) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	g.keep(fd)
	to := &unix.SockaddrLinklayer{Ifindex: g.eth0, Halen: 6, Addr: [8]byte{2, 0, 0, 0, 0x77, 1}}
	typ := uint16(unix.ETH_P_IP)
	if p.v6 {
		typ = unix.ETH_P_IPV6
	}
	to.Protocol = typ<<8 | typ>>8
	return unix.Sendto(fd, ipPacket(p, b), 0, to)
}

// join sends a membership report by joining a group, and another by leaving it.
func join(g *gun, p *probe, _ []byte) error {
	fd, err := g.socket(false, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.SetsockoptIPMreqn(
		fd,
		unix.IPPROTO_IP,
		unix.IP_ADD_MEMBERSHIP,
		&unix.IPMreqn{Multiaddr: [4]byte{239, 192, 152, 143}, Ifindex: int32(g.eth0)},
	)
}
