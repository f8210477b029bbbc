package publish

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Spec is a port of the program and the place where it is published.
type Spec struct {
	UDP    bool
	Listen netip.AddrPort // on the host; port 0: any that is free
	Path   string         // of a unix socket, in place of Listen
	Port   uint16         // of the program
}

// loopback is the address at which a port is published if none is given. Only the host itself can reach it.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// String returns the Spec in the form that Parse and ParseUnix take.
func (s Spec) String() string {
	if s.Path != "" {
		return s.Path + ":" + strconv.Itoa(int(s.Port))
	}
	text := s.Listen.String() + ":" + strconv.Itoa(int(s.Port))
	if s.UDP {
		text += "/udp"
	}
	return text
}

// Overlaps reports whether s and o are at one and the same place of the host.
func (s Spec) Overlaps(o Spec) bool {
	return s.Path == o.Path && s.UDP == o.UDP && s.Listen == o.Listen && (s.Path != "" || s.Listen.Port() != 0)
}

// Parse parses [ADDR:]PORT[:PORT][/tcp|/udp]: the address and port on the host, and the port of the program if it is
// different. An IPv6 address is in brackets.
func Parse(text string) (Spec, error) {
	var s Spec
	rest, proto, has := strings.Cut(text, "/")
	switch {
	case has && proto == "udp":
		s.UDP = true
	case has && proto != "tcp":
		return Spec{}, fmt.Errorf("%q is neither tcp nor udp", proto)
	}
	addr, ports := loopback, rest
	if end := strings.LastIndexByte(rest, ']'); end >= 0 {
		if !strings.HasPrefix(rest, "[") || !strings.HasPrefix(rest[end+1:], ":") {
			return Spec{}, ErrForm
		}
		a, err := netip.ParseAddr(rest[1:end])
		if err != nil || !a.Is6() {
			return Spec{}, fmt.Errorf("%q is not an IPv6 address", rest[1:end])
		}
		addr, ports = a.Unmap(), rest[end+2:]
	} else if dots := strings.Count(rest, ":"); dots == 2 || strings.Contains(rest, ".") {
		a, after, has := strings.Cut(rest, ":")
		ip, err := netip.ParseAddr(a)
		if err != nil || !ip.Is4() {
			return Spec{}, fmt.Errorf("%q is not an IPv4 address", a)
		}
		if !has {
			return Spec{}, errors.New("the port is missing")
		}
		addr, ports = ip, after
	} else if dots > 2 {
		return Spec{}, errors.New("an IPv6 address is written in brackets, as in [::1]:8080:80")
	}
	at, inside, two := strings.Cut(ports, ":")
	if !two {
		inside = at
	}
	if inside == "0" && !two {
		return Spec{}, errors.New("0 stands for any port of the host, and needs the program's port behind it, as in 0:6800")
	}
	port, err := parsePort(at, two)
	if err != nil {
		return Spec{}, err
	}
	s.Listen = netip.AddrPortFrom(addr, port)
	if s.Port, err = parsePort(inside, false); err != nil {
		return Spec{}, err
	}
	return s, mayListen(addr)
}

// mayListen returns an error if nobody can connect to addr, although the kernel would let a socket listen there.
func mayListen(addr netip.Addr) error {
	switch {
	case addr.IsMulticast(), addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("%s is not the address of a host", addr)
	case addr.Is6() && addr.IsLinkLocalUnicast() && addr.Zone() == "":
		return fmt.Errorf("%s needs its device, as in [%[1]s%%eth0]:8080:80", addr)
	}
	return nil
}

// ParseUnix parses PATH:PORT: a unix socket of the host, and the program's TCP port.
func ParseUnix(text string) (Spec, error) {
	i := strings.LastIndexByte(text, ':')
	if i <= 0 {
		return Spec{}, ErrForm
	}
	port, err := parsePort(text[i+1:], false)
	return Spec{Path: text[:i], Port: port}, err
}

// ErrForm means that a text has another form than Parse or ParseUnix expects.
var ErrForm = errors.New("must be [ADDR:]PORT[:PORT][/udp] or PATH:PORT")

func parsePort(s string, zero bool) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 && !zero {
		return 0, fmt.Errorf("%q is not a port number", s)
	}
	return uint16(n), nil
}
