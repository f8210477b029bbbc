package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// The units for systemd start us with options that exist, and systemd understands them.
func TestUnits(t *testing.T) {
	units, err := filepath.Glob("../../scripts/*.service")
	if err != nil || len(units) != 3 {
		t.Fatalf("%q, %v", units, err)
	}
	conf := filepath.Join(t.TempDir(), "conf")
	if err := os.WriteFile(conf, []byte("proxy socks5://192.0.2.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var verify []string
	for _, unit := range units {
		b, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		started := 0
		for line := range strings.Lines(string(b)) {
			key, command, _ := strings.Cut(strings.TrimSpace(line), "=")
			words := strings.Fields(command)
			if !strings.HasPrefix(key, "Exec") || words[0] != "/usr/local/bin/viasocks" {
				continue
			}
			started++
			c := lookup(words[1])
			if c == nil {
				t.Errorf("%s: there is no command %s", unit, words[1])
				continue
			}
			args := words[2:]
			for i := range args {
				if strings.HasPrefix(args[i], "/etc/viasocks/") {
					args[i] = conf
				}
			}
			if _, err := config.Parse(c.takes, args, nil); err != nil {
				t.Errorf("%s: %s: %v", unit, line, err)
			}
		}
		if started == 0 {
			t.Errorf("%s does not start us", unit)
		}
		// systemd looks whether the program is there.
		name := filepath.Join(dir, strings.Replace(filepath.Base(unit), "@", "@x", 1))
		if err := os.WriteFile(name, []byte(strings.ReplaceAll(string(b), "/usr/local/bin/viasocks", "/bin/true")),
			0o644); err != nil {
			t.Fatal(err)
		}
		verify = append(verify, name)
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed: the units are not verified")
	}
	out, err := exec.Command(analyze, append([]string{"verify", "--man=no"}, verify...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}

// The units keep their sandbox: systemd rates what a service may do from 0 (nothing) to 10 (everything). Most of what is left is
// what viasocks is for: it is root, has CAP_NET_ADMIN, and opens sockets.
func TestUnitsSandbox(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	for _, unit := range []string{"viasocks", "viasocks@", "viasocks-closed"} {
		out, err := exec.Command(
			analyze, "security", "--offline=true", "--no-pager", "--threshold=30", "../../scripts/"+unit+".service",
		).CombinedOutput()
		if strings.Contains(string(out), "unrecognized option") {
			t.Skip("systemd-analyze is too old to look at files")
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", unit, err, out[max(0, len(out)-200):])
		}
	}
}
