package incoming

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/route/portmap"
)

// Forwarded is a port that the provider of a proxy forwards to the user by means of its own.
type Forwarded struct {
	Addr  netip.Addr    // where peers connect; invalid: the proxy's address, which it is asked for
	Port  uint16        // where peers connect
	Proto portmap.Proto // 0: TCP and UDP
}

// ParseForwarded parses [ADDRESS:]PORT[/tcp|/udp].
func ParseForwarded(text string) (f Forwarded, err error) {
	number, proto, has := strings.Cut(text, "/")
	switch {
	case has && proto == "tcp":
		f.Proto = portmap.TCP
	case has && proto == "udp":
		f.Proto = portmap.UDP
	case has:
		return f, fmt.Errorf("%q is not tcp or udp", proto)
	}
	if colon := strings.LastIndexByte(number, ':'); colon >= 0 {
		host := number[:colon]
		if f.Addr, err = netip.ParseAddr(host); err != nil || !f.Addr.Is4() {
			return f, fmt.Errorf("%q is no IPv4 address", host)
		}
		if !isHost(f.Addr) {
			return f, fmt.Errorf("nobody can connect to %s: write the address at which peers reach the port", host)
		}
		number = number[colon+1:]
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return f, errors.New("the port must be 1 to 65535")
	}
	f.Port = uint16(n)
	return f, nil
}

// isHost reports whether addr can be the IPv4 address of another host.
func isHost(addr netip.Addr) bool {
	first := addr.As4()[0]
	return first != 0 && first != 127 && first < 224
}

// Is reports whether f has ports of the protocol.
func (f Forwarded) Is(p portmap.Proto) bool { return f.Proto == 0 || f.Proto == p }

// Overlaps reports whether a protocol has both.
func (f Forwarded) Overlaps(o Forwarded) bool {
	return f.Port == o.Port && (f.Proto == 0 || o.Proto == 0 || f.Proto == o.Proto)
}

// Told is a forwarded port of one protocol, and the program's port that was told about it; 0: none yet.
type Told struct {
	Forwarded
	Inner uint16
}

// Told returns the forwarded ports. b may be nil.
func (b *Mapper) Told() []Told {
	if b == nil {
		return nil
	}
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	return append([]Told(nil), b.forwarded...)
}

// forward gives a port of the program a forwarded port, if one is free. The caller holds m.mu.
func (b *Mapper) forward(proto portmap.Proto, port uint16) (outer netip.AddrPort, s portmap.State, ok bool) {
	var free *Told
	for i := range b.forwarded {
		switch f := &b.forwarded[i]; {
		case f.Proto == proto && f.Inner == port:
			return b.outerOf(f)
		case f.Proto == proto && f.Inner == 0 && free == nil:
			free = f
		}
	}
	if free == nil {
		return outer, portmap.Wait, false
	}
	free.Inner = port
	return b.outerOf(free)
}

func (b *Mapper) outerOf(f *Told) (netip.AddrPort, portmap.State, bool) {
	at := f.Addr
	if !at.IsValid() {
		var state portmap.State
		if at, state = b.external(); state == portmap.Wait {
			return netip.AddrPort{}, portmap.Wait, true
		}
	}
	// Without an address the port is told nevertheless: NAT-PMP and UPnP ask for the address apart.
	return netip.AddrPortFrom(at, f.Port), portmap.Works, true
}

// unforward frees a forwarded port. The caller holds m.mu.
func (b *Mapper) unforward(proto portmap.Proto, port uint16) {
	for i := range b.forwarded {
		if f := &b.forwarded[i]; f.Proto == proto && f.Inner == port {
			f.Inner = 0
		}
	}
}

// toldOf returns an entry for each protocol of each of all.
func toldOf(all []Forwarded) (told []Told) {
	for _, f := range all {
		for _, p := range []portmap.Proto{portmap.TCP, portmap.UDP} {
			if f.Is(p) {
				told = append(told, Told{Forwarded: Forwarded{f.Addr, f.Port, p}})
			}
		}
	}
	return told
}
