package flow

import (
	"net/netip"
	"testing"
)

func TestAddresses(t *testing.T) {
	for _, row := range []struct {
		addr               string
		oneHost, canBePeer bool
	}{
		{"203.0.113.7", true, true},
		{"10.1.2.3", true, true},
		{"100.64.0.1", true, true},
		{"169.254.1.1", true, true},
		{"223.255.255.255", true, true},
		{"2001:db8::1", true, true},
		{"fd00::1", true, true},
		{"fd76:6961:736f:636c::1", true, true},
		{"198.17.255.255", true, true},
		{"198.20.0.0", true, true},

		{"198.18.0.1", true, false},
		{"198.19.255.255", true, false},
		{"fd76:6961:736f:636b::5", true, false},
		{"169.254.169.254", true, false},

		{"0.0.0.0", false, false},
		{"0.1.2.3", false, false},
		{"127.0.0.1", false, false},
		{"127.9.9.9", false, false},
		{"224.0.0.1", false, false},
		{"239.255.255.255", false, false},
		{"240.0.0.1", false, false},
		{"255.255.255.255", false, false},
		{"::", false, false},
		{"::1", false, false},
		{"ff02::1", false, false},
		{"::ffff:203.0.113.7", false, false},
		{"::ffff:127.0.0.1", false, false},
	} {
		a := netip.MustParseAddr(row.addr)
		if got := OneHost(a); got != row.oneHost {
			t.Errorf("OneHost(%v) = %v", a, got)
		}
		if got := CanBePeer(a); got != row.canBePeer {
			t.Errorf("CanBePeer(%v) = %v", a, got)
		}
	}
	if OneHost(netip.Addr{}) || CanBePeer(netip.Addr{}) {
		t.Error("no address at all is taken for one")
	}
	for _, a := range []netip.Addr{Gateway4, Gateway6} {
		if !IsOurs(a) || !OneHost(a) {
			t.Errorf("%v is not an address of ours that packets can come from", a)
		}
	}
}
