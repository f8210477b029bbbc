package main

import (
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
)

// health of a program under run: it passes with the proxy and not without it.
func TestHealthOfRun(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	xdg := t.TempDir()
	health := func(args ...string) string {
		t.Helper()
		begun := time.Now()
		out := asked(t, xdg, append([]string{"health", "--state-dir", t.TempDir() + "/none"}, args...)...)
		if took := time.Since(begun); took > control.HealthTime+time.Second {
			t.Errorf("it took %v", took)
		}
		return out
	}
	cmd, end := instance(t, xdg, s.URL())
	pid := "--pid=" + strconv.Itoa(cmd.Process.Pid)
	if got := health(pid); !strings.HasPrefix(got, "exit 0\n--- stdout\nhealthy: process ") ||
		!strings.Contains(got, s.Addr().String()+" works\n") {
		t.Error(got)
	}
	if got := health(pid, "--json"); !strings.Contains(got, `"healthy": true`) || !strings.Contains(got, `"mode": "run"`) {
		t.Error(got)
	}
	_, endOther := instance(t, xdg, s.URL())
	if got := health(); !strings.Contains(got, " programs of yours run under 'viasocks run': choose one with --pid") {
		t.Error(got)
	}
	endOther()
	s.Close()
	testkit.Eventually(t, "the proxy that has gone is noticed", func() bool {
		got := health(pid)
		return strings.HasPrefix(got, "exit 1\n") && strings.Contains(got, "connection refused") &&
			strings.Contains(got, ": 'viasocks doctor' says more\n")
	})
	end()
}

// health of up: it does not pass when the process is stopped.
func TestHealthOfUp(t *testing.T) {
	h := newHost(t)
	p := h.up("--proxy", h.proxy)
	if got := h.result("health"); !strings.HasPrefix(got, "exit 0\n") ||
		!strings.Contains(got, "carries this host, "+h.proxy+" works") {
		t.Error(got)
	}
	p.cmd.Process.Signal(syscall.SIGSTOP)
	begun := time.Now()
	got := h.result("health")
	if took := time.Since(begun); !strings.HasPrefix(got, "exit 1\n") || took > control.HealthTime+time.Second {
		t.Errorf("after %v: %s", took, got)
	}
	p.cmd.Process.Signal(syscall.SIGCONT)
	testkit.Eventually(t, "health after it goes on", func() bool { return strings.HasPrefix(h.result("health"), "exit 0\n") })
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
}
