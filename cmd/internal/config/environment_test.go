package config

import (
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
)

// sampleValues are for options whose values cannot be told from their help.
var sampleValues = map[string]string{
	"proxy": "socks5://other", "upstream": "lab=socks5://l", "dns": "tcp://192.0.2.53", "dns-pool": "198.19.0.0/16",
	"dns-pool6": "fd00:1::/48", "ipv6": "off", "offload": "off", "udp-gso": "on", "mtu": "9000", "rule": "port 25 reject",
	"allow": "tcp:443", "sniff": "rules", "sniff-port": "8080", "sniff-wait": "1s", "ping": "22", "rule-for": "tcp:h.example:443",
	"lan":     "refuse",
	"inbound": "carry", "inbound-port": "51820", "exclude": "192.0.2.0/24", "exclude-uid": "7", "exclude-port": "22",
	"exclude-device": "wg0", "exclude-cgroup": "system.slice", "include": "192.0.2.0/24", "include-uid": "7",
	"include-port":   "22",
	"include-device": "wg0", "include-cgroup": "system.slice", "resolved": "off", "control-group": "0", "tun": "vs1",
	"mark": "0x100/0xff00", "nft-table": "vs", "table": "77", "dns-for": "lan.example=tcp://192.0.2.53", "max-pending": "777",
	"dns-exclude": "*.ads.example", "direct": "carry", "exclude-unit": "chrony.service", "exclude-exe": "/usr/bin/true",
	"reach-host": "8080,9000-9010",
	"dns-search": "lan.example", "dns-single-labels": "off", "pool": "3", "pipeline": "on", "log-level": "error",
	"state-dir": "/run/vs",
	"peer":      "vps.example:7000",
	"on-port":   "/bin/sh", "ftp-active": "21,2121", "forwarded-port": "50000/udp", "stun": "203.0.113.9:3478",
	"user": "1:1", "netns": "blue",
}

func sampleOf(t *testing.T, o *Option, dir string) string {
	t.Helper()
	path := filepath.Join(dir, o.Name)
	if s := sampleValues[o.Name]; s != "" {
		return s
	}
	switch {
	case o.Arg == "":
		return "true"
	case o.Arg == "TIME":
		return "31s"
	case o.Arg == "N":
		return "77"
	case strings.HasSuffix(o.Name, "-ca"):
		_, pem, err := sockstest.Certificate("h")
		if err != nil || os.WriteFile(path, pem, 0o600) != nil {
			t.Fatal(err)
		}
		return path
	case strings.HasSuffix(o.Arg, "FILE"):
		text := "secret\n"
		if o.Name == fileOption {
			text = "table 77\n"
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, guess := range []string{"77", "31s", "on", "off", "name", "127.0.0.1:9900", "unix:/run/x", "192.0.2.1:99", path} {
		if o.set == nil || o.set(blank(), value{name: o.Name, text: guess}) == nil {
			return guess
		}
	}
	t.Fatalf("there is no sample for --%s: add one to sampleValues", o.Name)
	return ""
}

// comparable leaves out where the values came from. Pools of certificates hold functions, so only whether there is one counts.
func comparable(c *Config) Config {
	d := *c
	d.kept, d.given, d.proxyAt, d.passwordFiles = nil, nil, value{}, nil
	d.proxyCA.where, d.dnsCA.where = "", ""
	if d.DNSRoots != nil {
		d.DNSRoots = x509.NewCertPool()
	}
	return d
}

// Each option does the same as a variable of the environment as it does as a flag. It does something: the configuration is
// another one than without it.
func TestEveryOptionFromTheEnvironment(t *testing.T) {
	dir := t.TempDir()
	for i := range Options {
		o := &Options[i]
		cmd := Command(1)
		for o.Cmds&cmd == 0 {
			cmd <<= 1
		}
		var base, program []string
		if cmd&all != 0 {
			base = []string{"--proxy", "socks5://al@h"}
		}
		if o.Name == "proxy" {
			base = []string{"--rule", "direct"}
		}
		switch cmd {
		case Run:
			program = []string{"true"}
		case Capture:
			program = []string{"-"}
		}
		sample := sampleOf(t, o, dir)
		parsed := func(args, env []string) Config {
			c, err := Parse(cmd, append(append([]string{}, base...), append(args, program...)...), env)
			if err != nil {
				t.Errorf("--%s %s: %v", o.Name, sample, err)
				return Config{}
			}
			return comparable(c)
		}
		flag, env := parsed([]string{"--" + o.Name + "=" + sample}, nil), parsed(nil, []string{o.Variable() + "=" + sample})
		if !reflect.DeepEqual(flag, env) {
			t.Errorf("%s=%s:\n%#v\nis not --%s:\n%#v", o.Variable(), sample, env, o.Name, flag)
		}
		if o.set != nil && reflect.DeepEqual(flag, parsed(nil, nil)) {
			t.Errorf("--%s %s changes nothing", o.Name, sample)
		}
		if n := o.Variable() + "_2"; o.Many && !reflect.DeepEqual(parsed(nil, []string{n + "=" + sample}), env) {
			t.Errorf("%s is not %s", n, o.Variable())
		}
	}
}

// A flag wins over the environment, and the environment over the file. Lists are replaced as a whole, and stand in the order of
// the numbers.
func TestEnvironmentPrecedence(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "conf")
	if err := os.WriteFile(conf, []byte("proxy socks5://file\nmtu 2000\ntable 1000\nrule port 1 reject\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{
		"VIASOCKS_CONFIG=" + conf, "VIASOCKS_PROXY=socks5://env", "VIASOCKS_MTU=3000", "VIASOCKS_RULE_10=port 10 reject",
		"VIASOCKS_RULE=port 2 reject", "VIASOCKS_RULE_9=port 9 reject", "VIASOCKS_STRICT=", "VIASOCKS_JSON=not of this command",
		"VIASOCKS_MTU=5000", "ALL_PROXY=socks5://all",
	}
	for _, tt := range []struct{ args, want string }{
		{"", "socks5://env:1080 3000 1000 [port 2 reject port 9 reject port 10 reject]"},
		{"--proxy socks5://flag --mtu 4000 --rule direct", "socks5://flag:1080 4000 1000 [direct]"},
		{"--config /dev/null --table 5", "socks5://env:1080 3000 5 [port 2 reject port 9 reject port 10 reject]"},
	} {
		c, err := Parse(Up, strings.Fields(tt.args), env)
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		var rules []string
		for i := range c.Rules {
			rules = append(rules, c.Rules[i].String())
		}
		if got := fmt.Sprint(c.Upstreams[0].Server, " ", c.MTU, " ", c.Table, " ", rules); got != tt.want || len(c.Warnings) > 0 {
			t.Errorf("%s: got %s, want %s, warnings %q", tt.args, got, tt.want, c.Warnings)
		}
	}
}

func TestEnvironmentSecrets(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	proxy, lab := file("proxy", "socks5://al:geheim@h\r\nmore\n", 0o600), file("lab", "lab=socks5://bo:geheim2@l", 0o600)
	password := file("password", "geheim3\n", 0o600)
	for _, tt := range []struct {
		env  []string
		want string
	}{
		{[]string{"VIASOCKS_PROXY_FILE=" + proxy}, "al geheim"},
		{[]string{"VIASOCKS_UPSTREAM_7_FILE=" + lab}, "bo geheim2"},
		{[]string{"VIASOCKS_UPSTREAM_FILE=" + lab}, "bo geheim2"},
		{[]string{"VIASOCKS_PROXY=socks5://al@h", "VIASOCKS_PASSWORD_FILE=" + password}, "al geheim3"},
		{[]string{"VIASOCKS_UPSTREAM=lab=socks5://bo@h", "VIASOCKS_PASSWORD_LAB_FILE=" + password}, "bo geheim3"},
		{[]string{"VIASOCKS_UPSTREAM=lab=socks5://bo@h", "VIASOCKS_PASSWORD_FILE_1=lab=" + password}, "bo geheim3"},
	} {
		c, err := Parse(Up, nil, tt.env)
		if err != nil {
			t.Errorf("%q: %v", tt.env, err)
			continue
		}
		user, secret, _ := strings.Cut(tt.want, " ")
		want, err := c.Upstreams[0].Server.WithCredentials(user, secret)
		if err != nil || !reflect.DeepEqual(c.Upstreams[0].Server, want) || len(c.Warnings) > 0 {
			t.Errorf("%q: the login is not %s: %v, warnings %q", tt.env, tt.want, err, c.Warnings)
		}
	}
	for _, tt := range []struct {
		env []string
		err string
	}{
		{[]string{"VIASOCKS_PROXY_FILE=" + file("bad", "ftp://al:geheim@h", 0o600)}, "must begin with"},
		{[]string{"VIASOCKS_PROXY_FILE=" + file("empty", "\nx", 0o600)}, "its first line is empty"},
		{[]string{"VIASOCKS_PROXY_FILE=" + file("long", strings.Repeat("x", maxLine+1), 0o600)}, "longer than 4096 bytes"},
		{[]string{"VIASOCKS_PROXY_FILE=" + filepath.Join(dir, "none")}, "cannot read the VIASOCKS_PROXY_FILE file"},
		{
			[]string{"VIASOCKS_PROXY_FILE=" + proxy, "VIASOCKS_PROXY=socks5://al:geheim@h"},
			"cannot use both VIASOCKS_PROXY and VIASOCKS_PROXY_FILE",
		},
		{[]string{"VIASOCKS_PROXY=socks5://h", "VIASOCKS_MTU=9"}, "cannot use VIASOCKS_MTU=9"},
		{[]string{"VIASOCKS_PROXY=socks5://h", "VIASOCKS_STRICT=yes"}, "cannot use VIASOCKS_STRICT=yes: must be true or false"},
		{[]string{"VIASOCKS_PROXY=socks5://h", "VIASOCKS_RULE_3=port x reject"}, "cannot use VIASOCKS_RULE_3="},
	} {
		_, err := Parse(Up, nil, tt.env)
		if err == nil || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%q: %v, want %q", tt.env, err, tt.err)
		}
	}
	open := file("open", "socks5://h", 0o644)
	c, err := Parse(Up, nil, []string{"VIASOCKS_PROXY_FILE=" + open})
	if err != nil || !strings.Contains(strings.Join(c.Warnings, "\n"), "everybody can read the VIASOCKS_PROXY_FILE file "+open) {
		t.Errorf("%v, %v", c, err)
	}
}

// Variables that stand for nothing are warned of, without their values.
func TestUnknownVariables(t *testing.T) {
	known := []string{
		"VIASOCKS_PROXY=socks5://al@h", "VIASOCKS_PASSWORD=x", "VIASOCKS_UPSTREAM=lab-2=socks5://al@l",
		"VIASOCKS_PASSWORD_LAB_2=x",
		"VIASOCKS_LIMIT=3", "PATH=/bin", "VIASOCKSX=1",
	}
	unknown := []string{
		"VIASOCKS_PROXI=geheim", "VIASOCKS_MTU_1=9000", "VIASOCKS_RULE_01=x", "VIASOCKS_RULE_0=x", "VIASOCKS_RULE_10000=x",
		"VIASOCKS_RULE_-1=x", "VIASOCKS_RULE_FILE=x", "VIASOCKS_PASSWORD_NONE=x", "VIASOCKS_=x", "VIASOCKS_mtu=9000",
	}
	c, err := Parse(Up, nil, append(known, unknown...))
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, u := range unknown {
		name, _, _ := strings.Cut(u, "=")
		want = append(want, "the variable "+name+" stands for no option and is ignored")
	}
	if !reflect.DeepEqual(c.Warnings, want) {
		t.Errorf("got %q, want %q", c.Warnings, want)
	}
}
