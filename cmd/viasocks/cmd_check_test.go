package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCheck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "conf")
	conf := "proxy socks5://al:geheim@10.0.0.1\nupstream b=socks5://h:9\nrule port 25 reject\n" +
		"rule dst 10.0.0.0/8,fd00::/8 via b\ntable 7\n"
	if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	golden(t, "check.txt", result(t, viasocks("check", "--config", path, "--dns", "tcp://10.0.0.53,[2001:db8::53]:5353")))
	golden(t, "check_direct.txt", result(t, viasocks("check", "--rule", "port 443 direct", "--dns", "tcp://10.0.0.53")))
	golden(t, "check_rulefor.txt", result(t, viasocks("check", "--config", path, "--rule-for", "tcp:example.com:443",
		"--rule-for", "tcp:10.1.2.3:443", "--rule-for", "tcp:a.example:25", "--rule-for", "udp:192.0.2.1:53")))
	golden(t, "check_allow.txt", result(t, viasocks("check", "--dns", "tcp://10.0.0.53", "--allow", "tcp:db.example.com:5432",
		"--rule-for", "tcp:db.example.com:5432", "--rule-for", "tcp:192.0.2.1:5432")))
	golden(t, "check_chain.txt", result(t, viasocks("check", "--proxy", "socks5://h", "--dns", "tcp://10.0.0.53",
		"--upstream", "far=socks5://f,socks5://g via=proxy", "--rule", "via far")))
	golden(t, "check_nodefault.txt", result(t, viasocks("check", "--upstream", "b=socks5://h:9", "--rule", "port 80 via b")))
}
