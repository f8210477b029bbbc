package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// TestBashCompletion has a real bash complete command lines. The last word of each is the one that is completed.
func TestBashCompletion(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("bash is not installed")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "vs-settings.conf"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(dir, "completion")
	if err := os.WriteFile(script, []byte(completion(t, "bash")), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ words, want string }{
		{"viasocks|ru", "run"},
		{"viasocks|run|--ipv6|o", "on off"},
		{"viasocks|run|--ipv6|=|a", "auto"},
		{"viasocks|run|--connect-t", "--connect-timeout"},
		{"viasocks|run|--config|vs-", "vs-settings.conf"},
		{"viasocks|up|--config|=|vs-", "vs-settings.conf"},
		{"viasocks|up|--log-level|w", "warn"},
		{"viasocks|up|--exclude-ui", "--exclude-uid"},
		{"viasocks|run|--exclude-u", ""}, // an option of up
		{"viasocks|run|--proxy|socks5://192.0.2.1|uptim", "uptime"},
		{"viasocks|run|--proxy|=|socks5://192.0.2.1|uptim", "uptime"},
		{"viasocks|run|--|uptim", "uptime"},
		{"viasocks|run|--keep-proxy-env|cat|vs-", "vs-settings.conf"},
		{"viasocks|run|cat|--ver", ""}, // an option of the program
		{"viasocks|completion|f", "fish"},
		{"viasocks|help|conf", "confirm"},
		{"viasocks|no-command|x", ""},
	} {
		const complete = `source "$0"; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _viasocks; printf '%s\n' "${COMPREPLY[@]}" | sort -u`
		cmd := exec.Command(bash, append([]string{"--norc", "-c", complete, script}, strings.Split(tt.words, "|")...)...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		got := strings.Fields(string(out))
		want := strings.Fields(tt.want)
		if len(want) == 2 {
			want[0], want[1] = want[1], want[0] // in the order of sort
		}
		if err != nil || strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("%s: %q %v, want %q", tt.words, got, err, want)
		}
	}
}

// TestCompletionScripts: the shells that are installed can read their scripts, and each option stands in each of them.
func TestCompletionScripts(t *testing.T) {
	for _, shell := range config.Shells {
		script := completion(t, shell)
		for _, o := range config.Options {
			if !strings.Contains(script, o.Name) {
				t.Errorf("%s: no --%s", shell, o.Name)
			}
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			continue
		}
		cmd := exec.Command(path, "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s does not take its script: %v: %s", shell, err, out)
		}
	}
	for _, bad := range [][]string{{}, {"tcsh"}, {"bash", "zsh"}} {
		if got := result(t, viasocks(append([]string{"completion"}, bad...)...)); !strings.Contains(got, "exit 2") ||
			!strings.Contains(got, "bash, zsh, fish") {
			t.Errorf("completion %q: %s", bad, got)
		}
	}
}

func completion(t *testing.T, shell string) string {
	t.Helper()
	out, err := viasocks("completion", shell).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
