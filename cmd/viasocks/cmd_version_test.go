package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strings"
	"testing"
)

func TestVersion(t *testing.T) {
	got := result(t, viasocks("version"))
	if !strings.HasPrefix(got, "exit 0\n--- stdout\nviasocks ") || strings.Count(got, "\n") != 4 {
		t.Error(got)
	}
	if result(t, viasocks("--version")) != got {
		t.Error("--version differs")
	}
	info := &debug.BuildInfo{Settings: []debug.BuildSetting{
		{
			Key:   "vcs.revision",
			Value: "0123456789abcdef",
		}, {Key: "vcs.time", Value: "2026-11-22T00:00:00Z"}, {Key: "vcs.modified", Value: "true"},
	}}
	info.Main.Version = "v1.2.3"
	info.Deps = []*debug.Module{{Path: "gvisor.dev/gvisor", Version: "v4.5.6"}}
	if v := version(info); !strings.HasPrefix(v, "viasocks v1.2.3 (0123456789ab, 2026-11-22T00:00:00Z, modified) go1.") ||
		!strings.HasSuffix(v, ", gVisor v4.5.6") {
		t.Error(v)
	}
	if v := version(&debug.BuildInfo{}); !strings.HasPrefix(v, "viasocks devel go1.") {
		t.Error(v)
	}
	defer func() { release, revision = "", "" }()
	release, revision = "1.3.0", "fedcba9876543210"
	if v := version(info); !strings.HasPrefix(v, "viasocks 1.3.0 (fedcba987654, 2026-") ||
		strings.Contains(shortVersion(), "gVisor") {
		t.Error(v)
	}
}

// copyVersionScript copies the script and what it reads to a new directory.
func copyVersionScript(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, file := range []string{"scripts/version.sh", "CHANGELOG.md"} {
		b, err := os.ReadFile(filepath.Join("../..", file))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Without .git the version is that of the changelog, and what is set wins.
func TestVersionScript(t *testing.T) {
	changelog := regexp.MustCompile(`(?m)^## (\d+\.\d+\.\d+)`).FindStringSubmatch(manualPage(t, "../../CHANGELOG.md"))
	if changelog == nil {
		t.Fatal("CHANGELOG.md has no version")
	}
	dir := copyVersionScript(t)
	run := func(env ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(dir, "scripts/version.sh"))
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	git := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@example.org"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %q: %v: %s", args, err, out)
		}
	}
	if got := run(); got != changelog[1]+"-dev" {
		t.Errorf("without .git: %s", got)
	}
	if got := run("VIASOCKS_VERSION=v7.8.9"); got != "7.8.9" {
		t.Errorf("VIASOCKS_VERSION: %s", got)
	}
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("git is not installed")
	}
	git("init", "-q")
	git("add", ".")
	git("commit", "-q", "-m", "first")
	if got := run(); !regexp.MustCompile(`^` + regexp.QuoteMeta(changelog[1]) + `-dev\.1\+g[0-9a-f]{12}$`).MatchString(got) {
		t.Errorf("without a tag: %s", got)
	}
	git("tag", "v4.5.6")
	if got := run(); got != "4.5.6" {
		t.Errorf("with a tag: %s", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "CHANGELOG.md"), []byte("## 4.6.0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := run(); !strings.HasPrefix(got, "4.6.0-dev.1+g") || !strings.HasSuffix(got, ".dirty") {
		t.Errorf("with a tag and a change: %s", got)
	}
}
