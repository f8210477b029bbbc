package route

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/flow"
)

// TestStraightRules: a rule is taken by the kernel only if no earlier one may decide otherwise.
func TestStraightRules(t *testing.T) {
	for _, c := range []struct {
		rules string
		want  []int
	}{
		{"dst 192.0.2.0/24 direct", []int{0}},
		{"port 22 direct", []int{0}},
		{"proto udp dst 2001:db8::/32 port 123 direct", []int{0}},
		{"direct", nil},
		{"proto tcp direct", nil},
		{"dst 192.0.2.0/24 via a", nil},
		{"dst 192.0.2.0/24 reject", nil},
		{"name example.com direct", nil},
		{"dst 192.0.2.0/24 user 0 direct", nil},
		{"not dst 192.0.2.0/24 direct", nil},
		{"dst 192.0.2.0/24 src 10.0.0.0/8 direct", nil},
		// Order: an earlier rule that overlaps and decides otherwise.
		{"dst 192.0.2.1 via a; dst 192.0.2.0/24 direct", nil},
		{"dst 192.0.2.1 reject; dst 192.0.2.0/24 direct", nil},
		{"dst 192.0.2.1 direct; dst 192.0.2.0/24 direct", []int{0, 1}},
		{"dst 198.51.100.0/24 via a; dst 192.0.2.0/24 direct", []int{1}},
		{"port 25 reject; dst 192.0.2.0/24 direct", nil},
		{"port 25 reject; dst 192.0.2.0/24 port 26-30 direct", []int{1}},
		{"port 20-26 reject; dst 192.0.2.0/24 port 26-30 direct", nil},
		{"proto udp reject; dst 192.0.2.0/24 proto tcp direct", []int{1}},
		{"proto udp reject; dst 192.0.2.0/24 direct", nil},
		{"name example.com via a; port 443 direct", nil},
		{"exe /usr/bin/curl via a; dst 192.0.2.0/24 direct", nil},
		{"exe /usr/bin/curl dst 203.0.113.0/24 via a; dst 192.0.2.0/24 direct", []int{1}},
		{"not dst 203.0.113.0/24 via a; dst 192.0.2.0/24 direct", nil},
		{"not port 22 via a; port 22 direct", nil}, // apart, but "not" proves nothing here
		{"dst 192.0.2.0/24 direct; dst 192.0.2.1 via a", []int{0}},
	} {
		at, _ := StraightRules(parseRules(t, strings.Split(c.rules, "; ")...), 100)
		if !slices.Equal(at, c.want) {
			t.Errorf("%s: %v, want %v", c.rules, at, c.want)
		}
	}
	overMany := parseRules(t, "dst 192.0.2.1,192.0.2.2 port 1,2 direct", "proto tcp dst 192.0.2.3 direct")
	if at, all := StraightRules(overMany, 2); len(all) != 1 || at[0] != 1 {
		t.Errorf("with room for 2: %v %v", at, all)
	}
}

// TestStraightDecidesAlike compares with the rules themselves: whatever the kernel lets out, these let out, too.
func TestStraightDecidesAlike(t *testing.T) {
	nets := []string{"192.0.2.0/24", "192.0.2.128/25", "192.0.2.7", "198.51.100.0/24", "2001:db8::/32"}
	verdicts := []string{"direct", "direct", "via a", "reject"}
	rng := rand.New(rand.NewPCG(1, 2))
	pick := func(from []string) string { return from[rng.IntN(len(from))] }
	taken := 0
	for range 3000 {
		var lines []string
		for range 1 + rng.IntN(4) {
			var words []string
			add := func(word, arg string) {
				if rng.IntN(6) == 0 {
					words = append(words, "not")
				}
				words = append(words, word, arg)
			}
			if rng.IntN(3) == 0 {
				add("proto", pick([]string{"tcp", "udp"}))
			}
			if rng.IntN(2) == 0 {
				add("dst", pick(nets))
			}
			if rng.IntN(2) == 0 {
				add("port", pick([]string{"22", "20-25", "443", "1-65535"}))
			}
			if rng.IntN(8) == 0 {
				add("user", "7")
			}
			lines = append(lines, strings.Join(append(words, pick(verdicts)), " "))
		}
		rules := parseRules(t, lines...)
		_, all := StraightRules(rules, 100)
		for _, s := range all {
			taken++
			a := netip.MustParseAddr(pick([]string{"192.0.2.7", "192.0.2.200", "198.51.100.1", "2001:db8::1"}))
			if s.Net.IsValid() {
				a = s.Net.Addr()
			}
			for _, port := range []uint16{s.Lo, s.Hi, 22, 443} {
				if port < s.Lo || port > s.Hi {
					continue
				}
				for _, uid := range []uint32{7, 8} {
					q := query{proto: s.Proto, dst: netip.AddrPortFrom(a, port), owner: &flow.Owner{Known: true, UID: uid}}
					i := slices.IndexFunc(rules, func(r Rule) bool { return r.matches(&q) == yes })
					if i < 0 || rules[i].Verdict() != "direct" {
						t.Fatalf("%q: %v user %d goes out, but rule %d decides", lines, q.dst, uid, i)
					}
				}
			}
		}
	}
	if taken < 100 {
		t.Errorf("only %d cases", taken)
	}
}
