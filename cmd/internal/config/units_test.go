package config

import (
	"strings"
	"testing"
)

func TestExcludeUnits(t *testing.T) {
	cfg, err := Parse(Up, []string{"--proxy", "socks5://192.0.2.1", "--exclude-unit", `chrony, foo@.service,0/x\x2dy.scope`,
		"--exclude-unit", "back.slice", "--rule", "port 25 reject", "--exclude-exe", "/usr/bin/a,/opt/*"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, u := range cfg.Host.ExcludeUnits {
		name := u.Name
		if u.User != nil {
			name = "user " + name
		}
		got = append(got, name)
	}
	if s, want := strings.Join(got, " "), `chrony.service foo@.service user x\x2dy.scope back.slice`; s != want {
		t.Errorf("units: %s, want %s", s, want)
	}
	got = nil
	for i := range cfg.Rules {
		got = append(got, cfg.Rules[i].String())
	}
	if s, want := strings.Join(got, "; "), "exe /usr/bin/a direct; exe /opt/* direct; port 25 reject"; s != want {
		t.Errorf("rules: %s, want %s", s, want)
	}
	for _, bad := range []string{"a/b/c.service", "../x", "x.mount", "", ".service", "@.service", "no-such-user-here/x", "0-5/x", "x y.service"} {
		if _, err := Parse(Up, []string{"--proxy", "socks5://192.0.2.1", "--exclude-unit", bad}, nil); err == nil {
			t.Errorf("--exclude-unit %q is taken", bad)
		}
	}
	for _, bad := range []string{"curl", "", "/usr/bin/a,", "/opt/my program", "/usr/bin/a port 80", "/usr/bin/a\tdirect"} {
		_, err := Parse(Up, []string{"--proxy", "socks5://192.0.2.1", "--exclude-exe", bad}, nil)
		if err == nil || !strings.Contains(err.Error(), "is not the absolute path of a program, without spaces") {
			t.Errorf("--exclude-exe %q: %v", bad, err)
		}
	}
}
