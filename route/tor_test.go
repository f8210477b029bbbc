package route

import (
	"net"
	"net/netip"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestAskTor: questions for addresses are answered by the RESOLVE of a Tor.
func TestAskTor(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, _ := newProxy(
		t,
		socks.Options{},
		sockstest.WithTor(nil),
		sockstest.WithResolve(func(name string) (netip.Addr, error) {
			if name != "example.com" {
				return netip.Addr{}, net.ErrClosed
			}
			return netip.MustParseAddr("192.0.2.9"), nil
		}),
	)
	_, tor := newClient(t, srv.URL()+"?tor", socks.Options{})
	g := newRig(
		t,
		Config{Upstreams: []Upstream{NewSOCKS("p", tor)}, Default: "p", Resolvers: []dns.Resolver{{Kind: dns.Tor}}},
		nil,
	)
	record := "\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xc0\x00\x02\x09"
	g.send("10.0.0.1:5000", "10.255.255.1:53", dnsQuestion)
	g.wantPacket(t, "10.255.255.1:53", "10.0.0.1:5000", dnsQuestion[:2]+"\x81\x80\x00\x01\x00\x01"+dnsQuestion[8:]+record)
	if n := srv.Requests(); len(n) != 1 || n[0].Cmd != sockstest.CmdResolve {
		t.Errorf("%+v", n)
	}
}
