package route

import (
	"errors"
	"maps"
	"net/netip"
	"sync/atomic"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

var (
	errMartian = errors.New("a datagram from an impossible address")
	errUnnamed = errors.New("a datagram from a name that nothing was sent to")
)

// linkNames contains the fake addresses whose datagrams a link sends to names. Its codec reads them without a lock, on
// the frame reader and on the loop. While there are none, this costs one atomic load for each datagram.
type linkNames struct{ table atomic.Pointer[namesOfLink] }

// namesOfLink is immutable.
type namesOfLink struct {
	byFake map[netip.AddrPort]string
	byName map[string]netip.AddrPort // by nameKey
}

// maxNameKey is the length of the longest nameKey.
const maxNameKey = 255 + 2

// appendNameKey appends a name in lower case, without a dot at its end, and a port. It allocates nothing if b has room
// for maxNameKey bytes and the name has at most 255.
func appendNameKey(b, name []byte, port uint16) []byte {
	if n := len(name); n > 0 && name[n-1] == '.' {
		name = name[:n-1]
	}
	for _, c := range name {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		b = append(b, c)
	}
	return append(b, byte(port>>8), byte(port))
}

// add makes the link send datagrams for fake to a name. Only one goroutine may call it at a time.
func (l *linkNames) add(fake netip.AddrPort, name string) {
	next := &namesOfLink{make(map[netip.AddrPort]string), make(map[string]netip.AddrPort)}
	if have := l.table.Load(); have != nil {
		maps.Copy(next.byFake, have.byFake)
		maps.Copy(next.byName, have.byName)
	}
	next.byFake[fake] = name
	next.byName[string(appendNameKey(nil, []byte(name), fake.Port()))] = fake
	l.table.Store(next)
}

// to returns the name to which datagrams for dst go, if there is one.
func (l *linkNames) to(dst netip.AddrPort) (string, bool) {
	t := l.table.Load()
	if t == nil {
		return "", false
	}
	name, ok := t.byFake[dst]
	return name, ok
}

// from returns the fake address that stands for a name as the source of a datagram. It is invalid if nothing was sent to
// this name.
func (l *linkNames) from(name []byte, port uint16) netip.AddrPort {
	t := l.table.Load()
	if t == nil || len(name) > 255 {
		return netip.AddrPort{}
	}
	var b [maxNameKey]byte
	return t.byName[string(appendNameKey(b[:0], name, port))]
}

// codec handles SOCKS's UDP headers. It drops impossible sources, and translates between names and fake addresses.
type codec struct {
	socks.UDPCodec
	names *linkNames
}

// AppendHeader implements relay.Codec.
func (c *codec) AppendHeader(b []byte, dst netip.AddrPort) []byte {
	if name, ok := c.names.to(dst); ok {
		return socks.AppendUDPHeader(b, socks.Addr{Name: name, Port: dst.Port()})
	}
	return c.UDPCodec.AppendHeader(b, dst)
}

// ParseHeader implements relay.Codec.
func (c *codec) ParseHeader(b []byte) (src netip.AddrPort, n int, err error) {
	src, name, n, err := socks.ParseUDPSource(b)
	switch {
	case err != nil:
	case name != nil:
		if src = c.names.from(name, src.Port()); !src.IsValid() {
			err = errUnnamed
		}
	case src.Port() == 0 || !flow.CanBePeer(src.Addr()):
		err = errMartian
	}
	return src, n, err
}

// uotCodec handles the frames of UDP over TCP. Impossible sources become invalid.
type uotCodec struct {
	socks.UoTCodec
	names *linkNames
}

// AppendHeader implements relay.StreamCodec.
func (c *uotCodec) AppendHeader(b []byte, dst netip.AddrPort, size int) []byte {
	if name, ok := c.names.to(dst); ok {
		return socks.AppendUoTName(b, name, dst.Port(), size)
	}
	return c.UoTCodec.AppendHeader(b, dst, size)
}

// ParseHeader implements relay.StreamCodec.
func (c *uotCodec) ParseHeader(b []byte) (src netip.AddrPort, n, size int, err error) {
	src, name, n, size, err := socks.ParseUoTSource(b)
	switch {
	case name != nil:
		src = c.names.from(name, src.Port())
	case src.IsValid() && (src.Port() == 0 || !flow.CanBePeer(src.Addr())):
		src = netip.AddrPort{}
	}
	return src, n, size, err
}
