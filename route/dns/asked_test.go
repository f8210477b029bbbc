package dns

import (
	"net/netip"
	"testing"
)

// Questions to different servers have different keys, also if the name of one has the bytes of the address of another.
func TestAppendServer(t *testing.T) {
	v6 := netip.MustParseAddr("6e73:2e65:7861:6d70:6c65:2e65:7861:6d70") // ns.example.examp
	port := func(a netip.Addr, p uint16) netip.AddrPort { return netip.AddrPortFrom(a, p) }
	keys := map[string]Resolver{"": {}}
	for _, r := range []Resolver{
		OverTCP(port(v6, 53)), {Addr: port(netip.Addr{}, 53), Name: "ns.example.examp"},
		OverTCP(port(v6, 54)), {Addr: port(netip.Addr{}, 54), Name: "ns.example.examp"},
		{Addr: port(netip.Addr{}, 53), Name: "ns.example"},
		OverTCP(port(netip.MustParseAddr("192.0.2.1"), 53)),
	} {
		k := string(appendServer(nil, r))
		if other, ok := keys[k]; ok {
			t.Errorf("%v and %v have the same key", r, other)
		}
		keys[k] = r
	}
}
