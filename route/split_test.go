package route

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
)

// TestSendsDirect: which names are direct by the rules, so that they are asked of the host's servers.
func TestSendsDirect(t *testing.T) {
	for _, tt := range []struct {
		rules  string // with commas between
		def    string
		direct string // names
		not    string
	}{
		{"", "proxy", "", "a.example"},
		{"name .corp.example direct", "proxy", "corp.example www.corp.example", "a.example"},
		{"name .corp.example direct; direct", "", "corp.example a.example", ""},
		{"name .corp.example via proxy; direct", "", "a.example", "www.corp.example"},
		{"port 25 reject; name .corp.example direct", "proxy", "corp.example", "a.example"},
		{"port 443 via proxy; name .corp.example direct", "proxy", "", "corp.example"},
		{"dst 192.0.2.0/24 via proxy; name .corp.example direct", "proxy", "corp.example", "a.example"},
		{"not name .example via proxy; direct", "", "a.example", "a.test"},
		{"user 1000 direct", "proxy", "", "a.example"},
		{"user 1000 direct; name b.example direct", "proxy", "b.example", "a.example"},
		{"dst 192.0.2.0/24 direct", "proxy", "", "a.example"},
		{"name b.example reject; direct", "", "a.example", "b.example"},
		{"", "direct", "a.example", ""},
	} {
		cfg := Config{Upstreams: []Upstream{&fakeUpstream{name: "proxy"}, &fakeUpstream{name: "direct"}}, Default: tt.def}
		for text := range strings.SplitSeq(tt.rules, ";") {
			if text = strings.TrimSpace(text); text != "" {
				r, err := ParseRule(text)
				if err != nil {
					t.Fatal(err)
				}
				cfg.Rules = append(cfg.Rules, r)
			}
		}
		p, err := newPolicy(cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range strings.Fields(tt.direct) {
			if !p.sendsDirect(name) {
				t.Errorf("%q: %s is not direct", tt.rules, name)
			}
		}
		for _, name := range strings.Fields(tt.not) {
			if p.sendsDirect(name) {
				t.Errorf("%q: %s is direct", tt.rules, name)
			}
		}
	}
}

func TestParseZone(t *testing.T) {
	at := netip.MustParseAddrPort
	for text, want := range map[string]dns.Zone{
		"corp.example=tcp://10.0.0.53": {Suffix: "corp.example", Resolvers: []dns.Resolver{dns.OverTCP(at("10.0.0.53:53"))}},
		"*.Corp.example.=tcp://10.0.0.53:54,tcp://[2001:db8::1]": {Suffix: "corp.example",
			Resolvers: []dns.Resolver{dns.OverTCP(at("10.0.0.53:54")), dns.OverTCP(at("[2001:db8::1]:53"))}},
		".lan=direct:udp://10.0.0.53,direct:tcp://10.0.0.54": {Suffix: "lan",
			Direct: []dns.DirectServer{{Addr: at("10.0.0.53:53")}, {Addr: at("10.0.0.54:53"), TCP: true}}},
		"lan=direct": {Suffix: "lan"},
		"10.in-addr.arpa=direct:udp://127.0.0.1": {Suffix: "10.in-addr.arpa",
			Direct: []dns.DirectServer{{Addr: at("127.0.0.1:53")}}},
	} {
		z, err := ParseZone(text)
		if err != nil || !reflect.DeepEqual(z, want) {
			t.Errorf("%s: %+v %v", text, z, err)
		}
		if again, err := ParseZone(z.String()); err != nil || !reflect.DeepEqual(z, again) {
			t.Errorf("%s is written %s", text, z)
		}
	}
	for _, text := range []string{
		"", "corp.example", "corp.example=", "=tcp://10.0.0.53", "a b=direct", "x..y=direct", "localhost=direct",
		"a.localhost=direct",
		"a=10.0.0.53", "a=udp://10.0.0.53", "a=direct:10.0.0.53", "a=direct,direct:udp://10.0.0.53", "a=tcp://10.0.0.53:0",
		"a=tcp://0.0.0.0", "a=tcp://224.0.0.1", "a=direct:udp://198.18.0.1", "a=tcp://10.0.0.53,direct:udp://10.0.0.53",
		"*=direct",
		"a=tcp://[fe80::1%25eth0]",
	} {
		if z, err := ParseZone(text); err == nil || !strings.HasPrefix(err.Error(), "must ") {
			t.Errorf("%q: %+v, %v", text, z, err)
		}
	}
}

func TestParseNames(t *testing.T) {
	file := filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(file, []byte("# ours\nlisted.example\n192.0.2.0/24\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string][2]string{
		"example.com,.corp.example": {"example.com corp.example a.corp.example", "www.example.com xcorp.example"},
		"img*.example":              {"img1.example", "im.example"},
		"list=" + file:              {"listed.example a.listed.example", "example"},
	} {
		n, err := ParseNames(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range strings.Fields(want[0]) {
			if !n.has(name) {
				t.Errorf("%s has not %s", text, name)
			}
		}
		for _, name := range strings.Fields(want[1]) {
			if n.has(name) {
				t.Errorf("%s has %s", text, name)
			}
		}
		if fmt.Sprint(n.List() != "") != fmt.Sprint(strings.HasPrefix(text, "list=")) {
			t.Errorf("%s has the file %q", text, n.List())
		}
	}
	for _, text := range []string{"", "a b", "list=", "list=/nowhere", "ä.example"} {
		if _, err := ParseNames(text); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}
