package socks

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

var errNoRelay = errors.New("the association has no relay")

// Beside opens n UDP sockets at the address from which this host reaches the relay. A datagram that the association sends to
// one of them shows the endpoint from which the server sends. reachable is false if no such datagram can arrive, because the
// address is private and the relay's is public, so that a NAT is between them. Options.PrepareSocket is called for each socket.
// The caller closes the sockets; there are none with an error.
func (a *Association) Beside(n int) (all []*net.UDPConn, reachable bool, err error) {
	at, err := a.local()
	if err != nil {
		return nil, false, err
	}
	for range n {
		c, err := a.listen(at)
		if err != nil {
			for _, c := range all {
				c.Close()
			}
			return nil, false, fmt.Errorf("cannot make a socket: %w", err)
		}
		all = append(all, c)
	}
	return all, scope(at) >= scope(a.relay.Addr()), nil
}

// Listen opens a UDP socket that is bound to no address and has nothing to do with the association, as a stranger would. The
// caller closes it.
func (a *Association) Listen() (*net.UDPConn, error) {
	if a.relay.Addr().Is6() {
		return a.listen(netip.IPv6Unspecified())
	}
	return a.listen(netip.IPv4Unspecified())
}

// local returns the address from which this host reaches the relay.
func (a *Association) local() (at netip.Addr, err error) {
	if !a.relay.IsValid() { // UDP over TCP
		return at, errNoRelay
	}
	fd, err := a.Dial()
	if err != nil {
		return at, err
	}
	defer unix.Close(fd)
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return at, fmt.Errorf("cannot make a socket: %w", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		at = netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		at = netip.AddrFrom16(sa.Addr).WithZone(a.relay.Addr().Zone())
	}
	return at, nil
}

// listen opens a UDP socket that is bound to ip. The caller closes it.
func (a *Association) listen(ip netip.Addr) (*net.UDPConn, error) {
	var sa sockaddrRoom
	if err := sa.set(netip.AddrPortFrom(ip, 0)); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(sa.domain(), unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "udp")
	defer f.Close() // FilePacketConn has a copy
	if prepare := a.d.opts.PrepareSocket; prepare != nil {
		if err := prepare(fd); err != nil {
			return nil, err
		}
	}
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: ip.As16(), ZoneId: sa.raw.Scope_id}
	if ip.Is4() {
		to = &unix.SockaddrInet4{Addr: ip.As4()}
	}
	if err := unix.Bind(fd, to); err != nil {
		return nil, err
	}
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}
