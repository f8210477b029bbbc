package daemon

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

// The host's addresses are read once a second, however many ask, and without an answer nobody is one of them.
func TestHostAddresses(t *testing.T) {
	reads, answer, fails := 0, []string{"192.0.2.1/24", "2001:db8::1/64"}, error(nil)
	h := &hostAddresses{read: func() (all []net.Addr, err error) {
		reads++
		for _, a := range answer {
			ip, n, err := net.ParseCIDR(a)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, &net.IPNet{IP: ip, Mask: n.Mask})
		}
		return all, fails
	}}
	now := time.Now()
	check := func(a string, want bool) {
		t.Helper()
		if got := h.has(netip.MustParseAddr(a), now); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
	for range 1000 {
		check("192.0.2.1", true)
		check("2001:db8::1", true)
		check("192.0.2.2", false)
	}
	if reads != 1 {
		t.Errorf("the addresses were read %d times", reads)
	}
	answer, now = []string{"192.0.2.2/24"}, now.Add(addressesFor)
	check("192.0.2.2", true)
	check("192.0.2.1", false)
	answer, fails, now = nil, errors.New("no answer"), now.Add(addressesFor)
	check("192.0.2.2", false)
	if reads != 3 {
		t.Errorf("the addresses were read %d times, want 3", reads)
	}
}
