package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// TestHostServers: which of the host's servers are asked, so that no question comes back to us.
func TestHostServers(t *testing.T) {
	dir := t.TempDir()
	oldConf, oldBeyond := resolvConf, beyondStub
	resolvConf, beyondStub = filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "beyond")
	defer func() { resolvConf, beyondStub = oldConf, oldBeyond }()
	for _, tt := range []struct {
		what, conf, beyond string
		up                 bool
		want               string
	}{
		{"a router", "nameserver 192.0.2.1\n", "", true, "192.0.2.1:53"},
		{"two, run", "nameserver 127.0.0.1\nnameserver 192.0.2.1\n", "", false, "127.0.0.1:53 192.0.2.1:53"},
		{"two, up", "nameserver 127.0.0.1\nnameserver 192.0.2.1\n", "", true, "192.0.2.1:53"},
		{"the stub, run", "nameserver 127.0.0.53\n", "nameserver 192.0.2.1\n", false, "127.0.0.53:53"},
		{"the stub, up", "nameserver 127.0.0.53\n", "nameserver 198.18.0.2\nnameserver 192.0.2.1\n", true, "192.0.2.1:53"},
		{"us alone", "nameserver 198.18.0.2\n", "", false, ""},
		{"one on the host, up", "nameserver 127.0.0.1\n", "", true, ""},
		{"nothing", "", "", false, ""},
	} {
		for path, text := range map[string]string{resolvConf: tt.conf, beyondStub: tt.beyond} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := HostServers(tt.up)
		var want []netip.AddrPort
		for _, s := range strings.Fields(tt.want) {
			want = append(want, netip.MustParseAddrPort(s))
		}
		if !reflect.DeepEqual(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%s: %v, %v", tt.what, got, err)
		}
	}
}

func TestSplitOptions(t *testing.T) {
	proxy := []string{"--proxy", "socks5://192.0.2.1", "--dns", "fake"}
	c, err := Parse(Run, append(proxy, "--dns-for", "corp.example=tcp://10.0.0.53", "--dns-for", "lan=direct", "--dns-exclude",
		"a.example,.b.example", "--dns-exclude", "c.example", "--dns-single-labels", "off", "--", "true"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if s := c.Split; len(s.Zones) != 2 || s.Zones[1].String() != "lan=direct" || len(s.Exclude) != 2 || !s.NoSingleLabels ||
		!c.AsksDirect() {
		t.Errorf("%+v", s)
	}
	for _, args := range [][]string{
		{"--dns-for", "corp.example"},
		{"--dns-for", "corp.example=tcp://10.0.0.53", "--dns-for", "CORP.example=direct"},
		{"--dns-for", "corp.example=udp://a"},
		{"--dns-exclude", "a b"},
		{"--dns-exclude", "list=/nowhere/at/all"},
		{"--dns-single-labels", "maybe"},
	} {
		if _, err := Parse(Run, append(append(proxy, args...), "--", "true"), nil); err == nil ||
			!strings.Contains(err.Error(), args[0]) {
			t.Errorf("%q: %v", args, err)
		}
	}
}
