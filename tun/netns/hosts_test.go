package netns

import (
	"net/netip"
	"testing"
)

func TestHostsContent(t *testing.T) {
	e := HostEntry{"host.internal", []netip.Addr{netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd00::2")}}
	for ipv6, want := range map[bool]string{
		true:  "198.18.0.2 host.internal\nfd00::2 host.internal\n127.0.0.1 localhost\n192.0.2.1 host.internal\n",
		false: "198.18.0.2 host.internal\n127.0.0.1 localhost\n192.0.2.1 host.internal\n",
	} {
		if got := hostsContent("127.0.0.1 localhost\n192.0.2.1 host.internal\n", e, ipv6); got != want {
			t.Errorf("IPv6 %v: %q, want %q", ipv6, got, want)
		}
	}
}
