package kernel

import (
	"strings"
	"testing"
)

// The warning about a rule of somebody else shows all that it matches, and what can be done.
func TestForeignRule(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		for _, l := range []string{
			"rule add fwmark 0x51/0xff iif br0 lookup 700 pref 4000", "-6 rule add not fwmark 0x52 lookup 701 pref 4001",
			"rule add from 192.168.7.0/24 to 203.0.113.0/24 ipproto udp dport 1000-2000 lookup main " +
				"suppress_prefixlength 0 pref 4002",
			"rule add uidrange 7-9 prohibit pref 9",
		} {
			ip(t, l)
		}
		h, tun := up(t, testConfig(t))
		got := strings.Join(h.Warnings(), "\n")
		for _, want := range []string{
			"IPv4 4000: fwmark 0x51/0xff iif br0 lookup 700", "with --priority 3980 ours",
			"IPv6 4001: not fwmark 0x52/0xffffffff lookup 701",
			"IPv4 4002: from 192.168.7.0/24 to 203.0.113.0/24 ipproto udp dport 1000-2000 lookup 254 suppress_prefixlength 0",
			"IPv4 9: uidrange 7-9",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("no %q in\n%s", want, got)
			}
		}
		down(t, h)
		tun.Close()
	})
}
