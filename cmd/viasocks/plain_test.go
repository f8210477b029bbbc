package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
)

// What a terminal would obey, or what turns a line round: escape sequences, their one-byte forms in UTF-8, carriage returns,
// and marks of the direction of writing.
const evil = "\x1b]0;owned\x07\x1b[2J\r\u009b31m\u202e"

// Nothing that a user, a file or a name says reaches a terminal as it is.
func TestNothingRawIsPrinted(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, evil+".conf")
	if err := os.WriteFile(conf, []byte("proxy socks5://192.0.2.1\nexclude-cgroup a\u009b31m\u202e\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(conf, 0o666); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(dir, "bad.conf")
	if err := os.WriteFile(bad, []byte("x\u009b31m\u202e y\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const proxy = "--proxy=socks5://127.0.0.1:1"
	live, err := sockstest.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	for _, args := range [][]string{
		{evil},
		{"help", evil},
		{"version", evil},
		{"check", "--" + evil},
		{"check", evil},
		{"check", "--proxy", evil},
		{"check", "--proxy", "socks5://h\u009b31m\u202e"},
		{"check", proxy, "--rule", evil},
		{"check", proxy, "--upstream", evil},
		{"check", proxy, "--exclude-uid", evil},
		{"check", proxy, "--exclude-cgroup", "/" + evil},
		{"check", proxy, "--dns", "tcp://" + evil},
		{"check", proxy, "--log-file", evil + "/x"},
		{"check", "--config", conf},
		{"check", "--config", bad},
		{"check", "--config", "/does/not/exist" + evil},
		{"check", "--proxy", "socks5://al@h", "--password-file", "/does/not/exist" + evil},
		{"run", "--proxy", live.URL(), "--", "/does/not/exist" + evil},
		{"run", "--proxy", live.URL(), "--", "sh", "-c", "exit 0", evil},
		{"run", proxy, "--", "/does/not/exist" + evil},
		{"run", "--proxy", "socks5://h.invalid\u009b31m\u202e", "true"},
		{"status", "--state-dir", "/" + evil},
		{"down", "--state-dir", "/does/not/exist" + evil + "/x"},
		{"up", proxy, "--state-dir", "/does/not/exist" + evil + "/x"},
		{"up", proxy, "--dry-run", "--exclude-cgroup", "a" + evil, "--state-dir", dir},
	} {
		got := result(t, viasocks(args...))
		for _, r := range got {
			if r != '\n' && !strconv.IsPrint(r) {
				t.Errorf("%q prints %q raw:\n%q", args, r, got)
				break
			}
		}
		if !strings.HasPrefix(got, "exit ") {
			t.Errorf("%q: %s", args, got)
		}
	}
	got := result(t, viasocks("check", "--config", conf))
	if !strings.HasPrefix(got, "exit 0\n") || !strings.Contains(got, "everybody can change the configuration file") {
		t.Errorf("check does not warn: %s", got)
	}
}
