package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// withResolvers puts other lists of resolvers in the place of this host's.
func withResolvers(t *testing.T, list, beyond string) {
	t.Helper()
	dir := t.TempDir()
	was, wasBeyond := resolvConf, beyondStub
	t.Cleanup(func() { resolvConf, beyondStub = was, wasBeyond })
	resolvConf, beyondStub = filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "beyond")
	for path, text := range map[string]string{resolvConf: list, beyondStub: beyond} {
		if text == "" {
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Without a proxy a rule must let something out; the resolvers are then the host's, asked directly.
func TestDirectOnly(t *testing.T) {
	const stub = "nameserver 127.0.0.53\noptions edns0\n"
	for _, tt := range []struct {
		cmd          Command
		list, beyond string
		args         []string
		want         string // the resolvers and how they are asked, or an error
	}{
		{Check, "# x\nnameserver 192.0.2.1\nnameserver\nnameserver 2001:db8::1 # y\nnameserver fe80::1%eth0\nnameserver x\n" +
			"nameserver 0.0.0.0\n", "",
			[]string{"--rule", "port 443 direct"}, "[tcp://192.0.2.1:53 tcp://[2001:db8::1]:53] direct"},
		{Check, stub, "nameserver 192.0.2.9\n", []string{"--rule", "direct"}, "[tcp://127.0.0.53:53] direct"},
		{Up, stub, "nameserver 127.0.0.1\nnameserver 192.0.2.9\n", []string{"--rule", "direct"}, "[tcp://192.0.2.9:53] direct"},
		{Up, "nameserver ::1\nnameserver 192.0.2.1\n", "nameserver 192.0.2.9\n", []string{"--rule", "direct"},
			"[tcp://192.0.2.1:53] direct"},
		{Up, stub, "", []string{"--rule", "direct"}, "own questions would come back to viasocks"},
		{Up, stub, "", []string{"--rule", "direct", "--dns", "tcp://192.0.2.3"}, "[tcp://192.0.2.3:53] direct"},
		{Check, "search a\n", "", []string{"--rule", "direct"}, "[tcp://127.0.0.1:53] direct"},
		{Check, "", "", []string{"--rule", "direct"}, "no such file or directory: name one with --dns"},
		{Check, strings.Repeat("#", maxResolvConf+1), "", []string{"--rule", "direct"}, "is too long"},
		{Check, "", "", []string{"--rule", "port 25 reject"}, "no proxy was given"},
		{Check, "", "", []string{"--rule", "via b"}, "no proxy was given"},
		{Check, "", "", []string{"--rule", "direct", "--rule", "via b"}, "name it with --upstream b=URL"},
		// A proxy, and a list that is not looked at.
		{Check, "", "", []string{"--rule", "direct", "--proxy", "socks5://h"}, "[tcp://1.1.1.1:53 tcp://9.9.9.9:53] proxy"},
		{Check, "", "", []string{"--rule", "direct", "--upstream", "b=socks5://h"}, "[tcp://1.1.1.1:53 tcp://9.9.9.9:53] "},
	} {
		withResolvers(t, tt.list, tt.beyond)
		c, err := Parse(tt.cmd, tt.args, nil)
		got := fmt.Sprint(err)
		if err == nil {
			got = fmt.Sprint(c.DNS, " ", c.ResolverDefault)
		}
		if err == nil && got != tt.want || err != nil && !strings.Contains(got, tt.want) {
			t.Errorf("%v with %q: got %s, want %s", tt.args, tt.list, got, tt.want)
		}
	}
}

// A file of certificates that cannot be used refuses the start, whether or not there is a resolver that needs it.
func TestDNSCA(t *testing.T) {
	for file, want := range map[string]string{
		"/nonexistent": "cannot read the certificates /nonexistent: ",
		"/dev/null":    "cannot use the certificates /dev/null: it contains no certificate in PEM format",
	} {
		_, err := Parse(Check, []string{"--proxy", "socks5://h", "--dns-ca", file}, nil)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// The modes, alone and with resolvers; those of the default are there when none is given.
func TestDNSModes(t *testing.T) {
	const usual = "[tcp://1.1.1.1:53 tcp://9.9.9.9:53]"
	for mode, want := range map[string]string{
		"relay":                         "false true false " + usual,
		"relay,tls://192.0.2.1":         "false true false [tls://192.0.2.1:853]",
		"fake":                          "true false false " + usual,
		"fake,relay":                    "true true false " + usual,
		"fake, relay, tcp://192.0.2.1 ": "true true false [tcp://192.0.2.1:53]",
		"off":                           "false false true []",
	} {
		c, err := Parse(Check, []string{"--proxy", "socks5://h", "--dns", mode}, nil)
		if err != nil {
			t.Errorf("%s: %v", mode, err)
			continue
		}
		if got := fmt.Sprint(c.Fake.On, c.Relay, c.DNSOff, c.DNS); got != want {
			t.Errorf("%s: got %s, want %s", mode, got, want)
		}
	}
	// A Tor knows names itself, and is asked unless the user says otherwise.
	for args, want := range map[string]string{
		"":                               "[tor tcp://1.1.1.1:53 tcp://9.9.9.9:53]",
		"--dns fake":                     "[tor tcp://1.1.1.1:53 tcp://9.9.9.9:53]",
		"--dns tor":                      "[tor]",
		"--dns tls://192.0.2.1,a,tor":    "[tls://192.0.2.1:853 tls://a:853 tor]",
		"--dns fake,tor,tcp://192.0.2.1": "[tor tcp://192.0.2.1:53]",
	} {
		c, err := Parse(Check, append([]string{"--proxy", "socks5://h?tor"}, strings.Fields(args)...), nil)
		if err != nil || fmt.Sprint(c.DNS) != want {
			t.Errorf("a Tor with %q: %v, %v", args, c, err)
		}
	}
}

// Each resolver has the scheme of the one before it, unless it has its own.
func TestResolverSchemes(t *testing.T) {
	c, err := Parse(
		Check,
		[]string{
			"--proxy",
			"socks5://h",
			"--dns",
			"tls://192.0.2.1,192.0.2.2#DNS.example, tcp://a.example ,b.example:5353,https://192.0.2.3/q",
		},
		nil,
	)
	if err != nil {
		t.Fatal(err)
	}
	want := "[tls://192.0.2.1:853 tls://192.0.2.2:853#dns.example tcp://a.example:53 tcp://b.example:5353 " +
		"https://192.0.2.3:443/q]"
	if got := fmt.Sprint(c.DNS); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestDefaultDNS: names become fake addresses unless something else is said, or a proxy takes no names.
func TestDefaultDNS(t *testing.T) {
	withResolvers(t, "nameserver 192.0.2.1\n", "")
	for _, tt := range []struct {
		args string
		fake bool
	}{
		{"--proxy socks5://h", true},
		{"--proxy socks4a://h", true},
		{"--proxy http://h", true},
		{"--rule direct --upstream b=socks5://h", true},
		{"--upstream b=socks4://h,socks5://h --rule via|b", true},
		{"--proxy socks4://h", false},
		{"--proxy socks5://h --upstream b=socks4://h", false},
		{"--rule direct", false},
		{"--proxy socks5://h --dns tcp://192.0.2.53", false},
		{"--proxy socks4://h --dns fake", true},
	} {
		args := strings.Fields(tt.args)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "|", " ")
		}
		for _, cmd := range []Command{Check, Up} {
			c, err := Parse(cmd, args, nil)
			if err != nil || c.Fake.On != tt.fake || len(c.DNS) == 0 {
				t.Errorf("%s: %v, fake %v, resolvers %v", tt.args, err, c != nil && c.Fake.On, c != nil && len(c.DNS) > 0)
			}
		}
	}
}
