package route

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// on is a query about a destination.
func on(proto flow.Proto, dst string) *query {
	return &query{proto: proto, dst: netip.MustParseAddrPort(dst)}
}

func TestPolicy(t *testing.T) {
	a, b := &fakeUpstream{name: "a"}, &fakeUpstream{name: DirectName}
	cfg := Config{Upstreams: []Upstream{a, b}, Default: "a", Rules: []Rule{
		mustRule(t, "dst 10.0.0.0/8 direct"),
		mustRule(t, "proto udp port 1-100 drop"),
		mustRule(t, "dst 2001:db8::/32 reject"),
		mustRule(t, "port 80 reject"), // never for UDP: an earlier one decides
	}}
	p, err := newPolicy(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		proto flow.Proto
		dst   string
		want  string
	}{
		{flow.TCP, "10.1.1.1:80", "dst 10.0.0.0/8 direct"},
		{flow.UDP, "192.0.2.1:80", "proto udp port 1-100 drop"},
		{flow.TCP, "192.0.2.1:80", "port 80 reject"},
		{flow.TCP, "[2001:db8::1]:443", "dst 2001:db8::/32 reject"},
		{flow.TCP, "192.0.2.1:443", "default"},
	} {
		if got := p.decide(on(tt.proto, tt.dst)); got.rule != tt.want {
			t.Errorf("%v %s: %q, want %q", tt.proto, tt.dst, got.rule, tt.want)
		}
	}
	cfg.Default = ""
	if p, err = newPolicy(cfg, nil); err != nil {
		t.Fatal(err)
	}
	if v := p.decide(on(flow.TCP, "192.0.2.1:443")); v.kind != reject || v.rule != "none" {
		t.Errorf("without a default: %+v, want a refusal", v)
	}
}

// A connection to a resolver goes by the rules, and by an upstream of its own where none matches.
func TestResolverDefault(t *testing.T) {
	a, b := &fakeUpstream{name: "a"}, &fakeUpstream{name: DirectName}
	for _, tt := range []struct{ def, resolvers, dst, want string }{
		{"", DirectName, "192.0.2.1:53", "direct dns"},
		{"", "", "192.0.2.1:53", "none"},
		{"a", "", "192.0.2.1:53", "a default"},
		{"a", "a", "192.0.2.1:53", "a default"},
		{"", DirectName, "10.0.0.1:53", "dst 10.0.0.0/8 reject"},
	} {
		p, err := newPolicy(Config{Upstreams: []Upstream{a, b}, Default: tt.def, ResolverDefault: tt.resolvers,
			Rules: []Rule{mustRule(t, "dst 10.0.0.0/8 reject")}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		v := p.decideResolver(dns.OverTCP(netip.MustParseAddrPort(tt.dst)))
		got := v.rule
		if v.kind == carry {
			got = v.up.name + " " + got
		}
		if got != tt.want {
			t.Errorf("default %q, resolvers %q: %s by %q, want %q", tt.def, tt.resolvers, tt.dst, got, tt.want)
		}
	}
	// A resolver has the name in its URL, whether or not its address is known.
	p, err := newPolicy(
		Config{Upstreams: []Upstream{a, b}, Default: "a", Rules: []Rule{mustRule(t, "name dns.example reject")}},
		nil,
	)
	if err != nil {
		t.Fatal(err)
	}
	for s, want := range map[string]kind{
		"tls://dns.example": reject, "tls://192.0.2.1#dns.example": reject, "tls://dns2.example": carry, "tls://192.0.2.1": carry,
	} {
		r, err := dns.ParseResolver(s)
		if err != nil {
			t.Fatal(err)
		}
		if v := p.decideResolver(r); v.kind != want {
			t.Errorf("%s: %+v", s, v)
		}
	}
	if _, err := newPolicy(Config{Upstreams: []Upstream{a}, ResolverDefault: "b"}, nil); err == nil ||
		!strings.Contains(err.Error(), "the upstreams are a") {
		t.Error(err)
	}
}

func TestPolicyErrors(t *testing.T) {
	a := &fakeUpstream{name: "a"}
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{Default: "a"}, "there are no upstreams"},
		{Config{Upstreams: []Upstream{a}, Default: "b"}, "the upstreams are a"},
		{Config{Upstreams: []Upstream{a, a}}, "two upstreams of one name"},
		{Config{Upstreams: []Upstream{a}, Rules: []Rule{mustRule(t, "direct")}},
			`no upstream is named "direct", the upstreams are a`},
		{Config{Upstreams: []Upstream{a}, Rules: []Rule{{}}}, "empty rule"},
		{Config{Upstreams: []Upstream{&fakeUpstream{name: "drop"}}}, "is a word of the rules"},
	} {
		if _, err := newPolicy(tt.cfg, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.cfg, err, tt.want)
		}
	}
}

// What no proxy can carry is impossible for TCP and UDP alike, whatever the rules say. Cloud metadata may go direct.
func TestImpossible(t *testing.T) {
	viaProxy := newRig(t, Config{Upstreams: []Upstream{&fakeUpstream{name: "a"}}, Default: "a"}, nil)
	direct := newRig(t, Config{Upstreams: []Upstream{&fakeUpstream{name: DirectName}}, Default: DirectName}, nil)
	for dst, want := range map[string][2]bool{
		"192.0.2.1:1": {true, true}, "[2001:db8::1]:1": {true, true}, "169.254.1.1:1": {true, true},
		"169.254.169.254:80": {false, true},
		"198.18.0.1:53":      {false, false}, "198.19.1.1:1": {false, false}, "[fd76:6961:736f:636b::7]:1": {false, false},
		"192.0.2.1:0": {false, false}, "224.0.0.1:1": {false, false}, "255.255.255.255:1": {false, false},
		"240.0.0.1:1": {false, false}, "0.1.2.3:1": {false, false}, "[::ffff:192.0.2.1]:1": {false, false},
		"0.0.0.0:1": {false, false}, "[::]:1": {false, false}, "127.0.0.1:1": {false, false},
		"[::1]:1": {false, false}, "[ff02::1]:1": {false, false},
	} {
		for i, r := range []*rig{viaProxy, direct} {
			for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
				v := r.verdictOn(on(proto, dst))
				if got := v.kind == carry; got != want[i] || !got && v != verdictImpossible {
					t.Errorf("%v %s, direct %v: carried %v", proto, dst, i == 1, got)
				}
			}
		}
	}
}

// The cache's slots are spread: neighbours in a network or in ports do not share one.
func TestCacheSpread(t *testing.T) {
	var c cache
	for name, at := range map[string]func(i int) netip.AddrPort{
		"addresses": func(i int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 6881)
		},
		"ports": func(i int) netip.AddrPort {
			return netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1"), uint16(1024+i))
		},
	} {
		used := map[int]bool{}
		for i := range cacheSize {
			s := c.slot(at(i))
			if s < 0 || s >= cacheSize {
				t.Fatalf("slot %d", s)
			}
			used[s] = true
		}
		if len(used) < cacheSize/2 {
			t.Errorf("%s: %d destinations share %d slots", name, cacheSize, len(used))
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			cfg := Config{Upstreams: []Upstream{&fakeUpstream{name: "a"}}, Default: "a"}
			for i := range n {
				cfg.Rules = append(
					cfg.Rules,
					mustRule(b, fmt.Sprintf("proto udp dst 10.%d.0.0/16,2001:db8:%x::/48 port 1000-2000 drop", i, i)),
				)
			}
			p, err := newPolicy(cfg, nil)
			if err != nil {
				b.Fatal(err)
			}
			q := on(flow.UDP, "192.0.2.1:1500")
			b.ReportAllocs()
			for b.Loop() {
				if p.decide(q) != p.otherwise {
					b.Fatal("wrong verdict")
				}
			}
		})
	}
}
