package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// readOnlyRun has cmd see a /run that can't be written.
func (h *netHost) readOnlyRun(cmd *exec.Cmd) *exec.Cmd {
	sh := `mount -t tmpfs -o ro none /run && exec "$@"`
	at := slices.Index(cmd.Args, h.name) + 1
	cmd.Args = slices.Insert(cmd.Args, at, "sh", "-c", sh, "sh")
	return cmd
}

// Where /run can't be written everything works with another state directory, nothing stays there, and who looks or steers with
// another one is told that there is a viasocks.
func TestStateDir(t *testing.T) {
	h := newHost(t)
	before := h.state()
	ro := func(args ...string) string { return result(t, h.readOnlyRun(h.viasocks(args...))) }
	if got := ro("up", "--proxy", h.proxy); !strings.HasPrefix(got, "exit 1\n") ||
		!strings.Contains(got, "read-only file system: choose a directory that can be written by --state-dir") {
		t.Error(got)
	}
	h.same("up that failed", before)

	parent := t.TempDir()
	dir := filepath.Join(parent, "state")
	with := func(args ...string) string { return ro(append(args, "--state-dir", dir)...) }
	p := h.launchAs(h.readOnlyRun, "--proxy", h.proxy, "--state-dir", dir)
	p.await("msg=ready")
	steered := h.state()
	for _, args := range [][]string{{"status"}, {"flows"}} {
		if got := with(args...); !strings.HasPrefix(got, "exit 0\n") {
			t.Errorf("%s: %s", args, got)
		}
	}
	h.knowsOfAnother(steered)
	if got := with("down"); !strings.HasPrefix(got, "exit 0\n--- stdout\nviasocks has stopped\n") {
		t.Error(got)
	}
	p.ends(0)
	h.same("down", before)

	p = h.launchAs(h.readOnlyRun, "--proxy", h.proxy, "--state-dir", dir, "--confirm", "5m")
	p.await("msg=ready")
	if got := with("confirm"); !strings.HasPrefix(got, "exit 0\n") {
		t.Error(got)
	}
	p.await("confirmed")
	p.cmd.Process.Kill()
	p.wait()
	if got := with("down"); !strings.HasPrefix(got, "exit 0\n") || !strings.Contains(got, "nftables table inet viasocks\n") {
		t.Error(got)
	}
	h.same("down after kill -9", before)

	p = h.launchAs(h.readOnlyRun, "--proxy", h.proxy, "--state-dir", dir, "--fail-open")
	p.await("msg=ready")
	p.cmd.Process.Kill()
	p.wait()
	h.same("fail-open after kill -9", before)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// knowsOfAnother asks a viasocks that has another state directory, which says that there is one, and touches nothing.
func (h *netHost) knowsOfAnother(steered string) {
	h.t.Helper()
	const another = "another viasocks is up here with another state directory (process "
	for _, args := range [][]string{
		{"up", "--proxy", h.proxy}, {"close", "--proxy", h.proxy}, {"down"},
		{"up", "--proxy", h.proxy, "--tun", "other0", "--table", "99", "--nft-table", "other", "--priority", "8000", "--mark",
			"0x100/0xff00"},
	} {
		got := h.result(args...)
		if !strings.HasPrefix(got, "exit 1\n") || !strings.Contains(got, another) || strings.Contains(got, "CAP_NET_ADMIN") {
			h.t.Errorf("%s: %s", args, got)
		}
		h.same(args[0]+" with another state directory", steered)
	}
	if got := h.result("status"); !strings.HasPrefix(got, "exit 1\n") ||
		!strings.Contains(got, "it is up here with another state directory (process ") {
		h.t.Error(got)
	}
}
