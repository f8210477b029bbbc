package route

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/flow"
)

func TestParseRule(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"via p1", "via p1"},
		{"direct", "direct"},
		{"via direct", "direct"},
		{"  proto   udp  drop ", "proto udp drop"},
		{"dst 10.0.0.0/8,fd00::/8 direct", "dst 10.0.0.0/8,fd00::/8 direct"},
		{"dst 192.0.2.1 reject", "dst 192.0.2.1/32 reject"},
		{"dst ::ffff:192.0.2.1 reject", "dst 192.0.2.1/32 reject"},
		{"port 80,6881-6889 proto tcp dst 2001:db8::/32 via a.b-c_d", "proto tcp dst 2001:db8::/32 port 80,6881-6889 via a.b-c_d"},
		{"port 7-7 drop", "port 7 drop"},
	} {
		r, err := ParseRule(tt.in)
		if err != nil {
			t.Errorf("%q: %v", tt.in, err)
		} else if r.String() != tt.want {
			t.Errorf("%q: got %q, want %q", tt.in, r.String(), tt.want)
		}
	}
}

func TestParseRuleErrors(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", "it has no verdict: end it with via NAME, direct, reject or drop"},
		{"proto tcp", "it has no verdict"},
		{"proto", `it ends after "proto": write tcp or udp`},
		{"proto icmp drop", `protocol "icmp": write tcp or udp`},
		{"proto tcp proto udp drop", `"proto" is there twice`},
		{"dst 10.0.0.1/8 drop", `has bits set behind its length: write 10.0.0.0/8, or 10.0.0.1 for the one address`},
		{"dst 10.0.0.0/33 drop", "write it in CIDR form"},
		{"dst example.com drop", "write an address or a network"},
		{"dst fe80::1%eth0 drop", "write an address or a network"},
		{"dst ::ffff:10.0.0.0/104 drop", "write an IPv4 network in its own form"},
		{"dst , drop", "write an address or a network"},
		{"port 0 drop", `port "0": write a number of 1 to 65535`},
		{"port 65536 drop", "write a number of 1 to 65535"},
		{"port 9-7 drop", "is empty: write 7-9"},
		{"port http drop", "write a number"},
		{"port +80 drop", "write a number"},
		{"via", `it ends after "via": write the name of an upstream`},
		{"via -x", "a letter or digit first"},
		{"via drop", "is a word of the rules"},
		{"drop port 80", `"port" comes after the verdict`},
		{"reject drop", "comes after the verdict"},
		{"allow", `unknown word "allow"`},
		{strings.Repeat("x", 5000), "the limit is 4096"},
		{"port " + strings.Repeat("1,", 300) + "1 drop", "the limit is 256"},
	} {
		_, err := ParseRule(tt.in)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "cannot use rule ") {
			t.Errorf("%q: got %v, want %q", clip(tt.in), err, tt.want)
		}
	}
}

func mustRule(t testing.TB, s string) Rule {
	t.Helper()
	r, err := ParseRule(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRuleMatches(t *testing.T) {
	for _, tt := range []struct {
		rule  string
		proto flow.Proto
		dst   string
		want  bool
	}{
		{"drop", flow.TCP, "192.0.2.1:80", true},
		{"proto udp drop", flow.TCP, "192.0.2.1:80", false},
		{"proto udp drop", flow.UDP, "192.0.2.1:80", true},
		{"dst 192.0.2.0/24 drop", flow.TCP, "192.0.2.255:80", true},
		{"dst 192.0.2.0/24 drop", flow.TCP, "192.0.3.0:80", false},
		{"dst 0.0.0.0/0 drop", flow.TCP, "[2001:db8::1]:80", false},
		{"dst ::/0 drop", flow.TCP, "192.0.2.1:80", false},
		{"dst 10.0.0.0/8,2001:db8::/32 drop", flow.TCP, "[2001:db8::1]:80", true},
		{"port 80,443 drop", flow.TCP, "192.0.2.1:443", true},
		{"port 80-90 drop", flow.TCP, "192.0.2.1:91", false},
		{"port 80-90 dst 192.0.2.1 proto tcp drop", flow.TCP, "192.0.2.1:90", true},
		{"port 80-90 dst 192.0.2.2 proto tcp drop", flow.TCP, "192.0.2.1:90", false},
	} {
		r := mustRule(t, tt.rule)
		if got := r.matches(tt.proto, netip.MustParseAddrPort(tt.dst)); got != tt.want {
			t.Errorf("%q on %s %s: %v, want %v", tt.rule, tt.proto, tt.dst, got, tt.want)
		}
	}
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"drop", "proto tcp dst 10.0.0.0/8,fd00::/8 port 1-2,65535 via x", "via direct", "dst ::ffff:1.2.3.4 reject", "port 1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			return
		}
		again, err := ParseRule(r.String())
		if err != nil || again.String() != r.String() {
			t.Fatalf("%q became %q, which reads as %q, %v", s, r.String(), again.String(), err)
		}
		r.matches(flow.TCP, netip.MustParseAddrPort("10.1.1.1:80"))
	})
}
