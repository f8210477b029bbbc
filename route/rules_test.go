package route

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
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
		{"port 80,6881-6889 proto tcp dst 2001:db8::/32 via a.b-c_d",
			"proto tcp dst 2001:db8::/32 port 80,6881-6889 via a.b-c_d"},
		{"port 7-7 drop", "port 7 drop"},
		{"name EXAMPLE.com.,.Example.net,*.a?.b reject", "name example.com,.example.net,*.a?.b reject"},
		{"not dst 10.0.0.0/8 not port 80 src fd00::/8 drop", "src fd00::/8 not dst 10.0.0.0/8 not port 80 drop"},
		{"exe /usr/bin/curl,*/wget cgroup /a/b/ user 1000-1999,root,7 direct",
			"user 1000-1999,root,7 cgroup a/b exe /usr/bin/curl,*/wget direct"},
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
		{"dst 10.0.0.1/8 drop", `has bits set beyond its length: write 10.0.0.0/8, or 10.0.0.1 for the one address`},
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
		{"not", `it ends after "not": write a condition`},
		{"not drop", `"not" stands before "drop"`},
		{"not not port 80 drop", `unknown word "not"`},
		{"not port 80 port 81 drop", `"port" is there twice`},
		{"name drop", "it has no verdict"},
		{"name a..b drop", "write a name such as example.com"},
		{"name . drop", "write a name such as example.com"},
		{"name .*.b drop", "write a name such as example.com"},
		{"name a/b drop", `'/' cannot stand in a name`},
		{"user nobody-here drop", "there is no such user"},
		{"user 9-7 drop", "is empty: write 7-9"},
		{"user , drop", "there is no such user"},
		{"cgroup / drop", "write its path below the root"},
		{"cgroup a/../b drop", "write its path below the root"},
		{"exe curl drop", "write its absolute path"},
		{"list= drop", "names no file"},
		{"list=/does/not/exist drop", "cannot read the list /does/not/exist: no such file or directory"},
		{"list=/ drop", "it is a directory"},
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
		if got := r.matches(on(tt.proto, tt.dst)) == yes; got != tt.want {
			t.Errorf("%q on %s %s: %v, want %v", tt.rule, tt.proto, tt.dst, got, tt.want)
		}
	}
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"drop", "proto tcp dst 10.0.0.0/8,fd00::/8 port 1-2,65535 via x", "via direct",
		"dst ::ffff:1.2.3.4 reject", "port 1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		none := func(path string) (*list, error) {
			if path == "" {
				return nil, errors.New("no file")
			}
			return &list{path: path}, nil
		}
		r, err := parseRule(s, none)
		if err != nil {
			return
		}
		again, err := parseRule(r.String(), none)
		if err != nil || again.String() != r.String() {
			t.Fatalf("%q became %q, which reads as %q, %v", s, r.String(), again.String(), err)
		}
		r.matches(on(flow.TCP, "10.1.1.1:80"))
	})
}

// Each condition alone, plain and turned round. What is not known meets no condition.
func TestConditions(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(file, []byte("# x\n192.0.2.128/25\nbad.example # y\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	known := query{
		proto: flow.TCP, src: netip.MustParseAddrPort("10.1.2.3:4"), dst: netip.MustParseAddrPort("192.0.2.1:80"),
		names: []string{"www.example.com", "mail.bad.example"},
		owner: &flow.Owner{Known: true, UID: 1000, PID: 7, Exe: "/usr/bin/curl", Cgroup: "a/b"},
	}
	unknown := query{proto: flow.TCP, src: known.src, dst: known.dst, owner: &flow.Owner{}}
	for _, tt := range []struct {
		condition      string
		known, unknown bool
	}{
		{"proto tcp", true, true}, {"proto udp", false, false},
		{"src 10.0.0.0/8", true, true}, {"src 192.0.2.0/24", false, false},
		{"dst 192.0.2.0/24", true, true}, {"dst 10.0.0.0/8", false, false},
		{"port 80", true, true}, {"port 81", false, false},
		{"name www.example.com", true, false}, {"name example.com", false, false}, {"name .example.com", true, false},
		{"name .ample.com", false, false}, {"name *.example.com", true, false}, {"name ???.example.com", true, false},
		{"name ??.example.com", false, false}, {"name w*e.c*m", true, false}, {"name a.b,.bad.example", true, false},
		{"name .www.example.com", true, false}, {"name *", true, false},
		{"list=" + file, true, false},
		{"user 1000", true, false}, {"user 0-999", false, false}, {"user 0", false, false}, {"user 5,900-1100", true, false},
		{"cgroup a", true, false}, {"cgroup a/b", true, false}, {"cgroup a/b/c", false, false}, {"cgroup a/bc,b", false, false},
		{"exe /usr/bin/curl", true, false}, {"exe */curl", true, false}, {"exe /usr/bin/cur", false, false},
		{"exe *", true, false},
	} {
		for _, not := range []bool{false, true} {
			text := tt.condition + " drop"
			if not {
				text = "not " + text
			}
			r := mustRule(t, text)
			for q, want := range map[*query]bool{&known: tt.known, &unknown: tt.unknown} {
				if got := r.matches(q) == yes; got == (want == not) {
					t.Errorf("%q, known %v: %v", text, q == &known, got)
				}
			}
			if r.String() != text {
				t.Errorf("%q became %q", text, r.String())
			}
			// Nobody has looked for the owner: it is asked for, and only where everything else matches.
			later := known
			later.owner = nil
			if got, want := r.matches(&later) == ask, r.AsksOwner(); got != want {
				t.Errorf("%q asks for an owner: %v", text, got)
			}
			if strings.Contains(text, "port") {
				continue
			}
			if r := mustRule(t, "port 1 "+text); r.matches(&later) != no {
				t.Errorf("%q asks for an owner that cannot matter", r.String())
			}
		}
	}
}
