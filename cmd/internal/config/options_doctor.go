package config

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/conform"
)

// doctorOptions are those of doctor alone.
var doctorOptions = []Option{
	{
		Name: "peer", Arg: "HOST[:PORT]", Many: true, Cmds: Doctor, set: addPeer,
		Help: "a host of yours behind the proxy where 'viasocks doctor --serve' runs",
		Man: `A host behind the proxy where
.Ql viasocks doctor --serve
runs; the port is ` + strconv.Itoa(conform.DefaultPort) + ` if none is given.
It is contacted only through the proxy.
Given a second time it names a second address of the same host, which the whole test of the kind of NAT needs.`,
	},
	{
		Name: "serve", Cmds: Doctor, set: boolean(func(c *Config) *bool { return &c.Serve }),
		Help: "be the far end for --peer, at the ADDRESS:PORT that follow, until stopped",
		Man: `Be the far end for
.Fl -peer ,
until stopped, at the one or two
.Ar ADDRESS:PORT
that follow as arguments, or at all addresses and port ` + strconv.Itoa(conform.DefaultPort) + `.
The port after it is used for UDP, too.
It answers nobody who does not speak its own protocol, UDP only to a client that has a TCP connection open, and never with more
bytes than it was sent.`,
	},
}

// Peer is a host where a far end of doctor listens.
type Peer struct {
	Host string // a name or an address
	Port uint16
}

func (p Peer) String() string { return net.JoinHostPort(p.Host, strconv.Itoa(int(p.Port))) }

// maxPeers are two addresses of one host.
const maxPeers = 2

func addPeer(c *Config, v value) error {
	p := Peer{v.text, conform.DefaultPort}
	if a, err := netip.ParseAddr(strings.Trim(v.text, "[]")); err == nil {
		p.Host = a.String()
	} else if host, port, err := net.SplitHostPort(v.text); err == nil {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return v.err("the port must be a number from 1 to 65535")
		}
		p = Peer{host, uint16(n)}
	}
	switch {
	case p.Host == "" || len(p.Host) > 253 || strings.ContainsAny(p.Host, "/@: ") && !strings.Contains(p.Host, ":"):
		return v.err("must be HOST or HOST:PORT, with an IPv6 address in brackets")
	case len(c.Peers) == maxPeers:
		return v.err("more than two addresses of the peer")
	}
	if strings.Contains(p.Host, ":") {
		if _, err := netip.ParseAddr(p.Host); err != nil {
			return v.err("must be HOST or HOST:PORT, with an IPv6 address in brackets")
		}
	}
	c.Peers = append(c.Peers, p)
	return nil
}

// setServeAt takes the arguments behind the options of doctor.
func (c *Config) setServeAt(args []string) error {
	if len(args) > 0 && !c.Serve {
		return usagef("cannot use %q: unexpected argument", args[0])
	}
	if len(args) > maxPeers {
		return usagef("cannot serve at more than %d addresses", maxPeers)
	}
	for _, text := range args {
		a, err := netip.ParseAddrPort(text)
		if err != nil {
			ip, ierr := netip.ParseAddr(strings.Trim(text, "[]"))
			if ierr != nil {
				return usagef("cannot serve at %q: must be ADDRESS:PORT, with an IPv6 address in brackets", text)
			}
			a = netip.AddrPortFrom(ip, conform.DefaultPort)
		}
		if a.Port() == 65535 {
			return usagef("cannot serve at %q: the next port is needed too", text)
		}
		c.ServeAt = append(c.ServeAt, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
	}
	if len(c.ServeAt) == 2 && c.ServeAt[0].Port() != c.ServeAt[1].Port() {
		return usagef("cannot serve at %s: both addresses need the same port", fmt.Sprint(c.ServeAt))
	}
	return nil
}
