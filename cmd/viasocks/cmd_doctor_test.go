package main

import (
	"strings"
	"syscall"
	"testing"
)

// doctor beside up uses its marks, so that the proxy is reached; after kill -9 it says that the host is closed and what opens it.
func TestDoctorBesideUp(t *testing.T) {
	h := newHost(t)
	p := h.up("--proxy", h.proxy)
	got := h.result("doctor", "--proxy", h.proxy)
	for _, want := range []string{"'viasocks up' is running", "ok         reached"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "  fault      ip rules") {
		t.Errorf("our own rules are taken for others':\n%s", got)
	}
	p.cmd.Process.Signal(syscall.SIGKILL)
	p.wait()
	got = h.result("doctor")
	for _, want := range []string{"exit 1\n", "This host is closed: a 'viasocks up' was killed",
		"viasocks down opens it"} {
		if !strings.Contains(strings.Join(strings.Fields(got), " "), strings.TrimSpace(want)) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if got := h.result("down"); !strings.HasPrefix(got, "exit 0\n") {
		t.Error(got)
	}
	if got := h.result("doctor"); !strings.Contains(got, "is not running, and has left nothing behind") {
		t.Error(got)
	}
}
