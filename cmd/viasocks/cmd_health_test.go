package main

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
)

// inTime says that health has taken too long, which a machine that stalls does not prove in one try.
func inTime(begun time.Time) error {
	if took := time.Since(begun); took > control.HealthTime+time.Second {
		return fmt.Errorf("it took %v", took)
	}
	return nil
}

// health of a program under run: it passes with the proxy and not without it.
func TestHealthOfRun(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	xdg := t.TempDir()
	health := func(args ...string) (out string) {
		t.Helper()
		testkit.Tries(t, "health", func() error {
			begun := time.Now()
			out = asked(t, xdg, append([]string{"health", "--state-dir", t.TempDir() + "/none"}, args...)...)
			return inTime(begun)
		})
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
	testkit.Tries(t, "health of a stopped viasocks", func() error {
		begun := time.Now()
		if got := h.result("health"); !strings.HasPrefix(got, "exit 1\n") {
			t.Error(got)
		}
		return inTime(begun)
	})
	p.cmd.Process.Signal(syscall.SIGCONT)
	testkit.Eventually(t, "health after it goes on", func() bool { return strings.HasPrefix(h.result("health"), "exit 0\n") })
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
}
