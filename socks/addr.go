package socks

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
)

// Address types of RFC 1928, section 5.
const (
	atypIPv4 = 1
	atypName = 3
	atypIPv6 = 4
)

// maxName is the longest name that fits the length byte of RFC 1928.
const maxName = 255

// Addr is a destination as SOCKS names it: an IP address or a name, and a port. Name wins when both are set.
type Addr struct {
	Name string     // at most 255 bytes, sent as it is
	IP   netip.Addr // has no zone, because SOCKS cannot carry one
	Port uint16
}

// AddrFrom returns the Addr of an endpoint.
func AddrFrom(ap netip.AddrPort) Addr { return Addr{IP: ap.Addr(), Port: ap.Port()} }

// AddrPort returns a as an endpoint. The result is invalid if a has a name.
func (a Addr) AddrPort() netip.AddrPort {
	if a.Name != "" {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.IP, a.Port)
}

// String returns "host:port", with brackets around an IPv6 address.
func (a Addr) String() string {
	host := a.Name
	if host == "" && a.IP.IsValid() {
		host = a.IP.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(a.Port)))
}

var errNoAddr = errors.New("neither a name nor an address is given")

// check returns an error if a cannot be put into a request.
func (a Addr) check() error {
	switch {
	case len(a.Name) > maxName:
		return fmt.Errorf("the name has %d bytes, SOCKS carries %d", len(a.Name), maxName)
	case a.Name == "" && !a.IP.IsValid():
		return errNoAddr
	}
	return nil
}

// appendAddr appends ATYP, address and port to b. The caller has called a.check.
func appendAddr(b []byte, a Addr) []byte {
	if a.Name != "" {
		name := a.Name[:min(len(a.Name), maxName)]
		b = append(b, atypName, byte(len(name)))
		b = append(b, name...)
		return append(b, byte(a.Port>>8), byte(a.Port))
	}
	return appendEndpoint(b, a.IP, a.Port)
}

// appendEndpoint is appendAddr for an IP address. It writes an IPv4-mapped address as IPv4, and an invalid one as
// 0.0.0.0.
func appendEndpoint(b []byte, ip netip.Addr, port uint16) []byte {
	switch {
	case ip.Is4() || ip.Is4In6():
		v := ip.As4()
		b = append(append(b, atypIPv4), v[:]...)
	case ip.Is6():
		v := ip.As16()
		b = append(append(b, atypIPv6), v[:]...)
	default:
		b = append(b, atypIPv4, 0, 0, 0, 0)
	}
	return append(b, byte(port>>8), byte(port))
}
