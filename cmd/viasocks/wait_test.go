package main

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

const nobodyURL = "socks5://127.0.0.1:9"

// launchWaiting starts viasocks without a proxy, and returns when it waits for it. The host is closed then.
func (h *netHost) launchWaiting(args ...string) *upProc {
	h.t.Helper()
	p := h.launch(append([]string{"--proxy", nobodyURL, "--wait"}, args...)...)
	p.await("waiting for the proxy")
	if got := h.run("ip -n " + h.name + " route get 203.0.113.1"); !strings.Contains(got, "dev viasocks0") {
		h.t.Errorf("the host is not closed: %s", got)
	}
	return p
}

// While it waits for the proxy every way to end it gives the host back; what waiting can't mend is an error at once.
func TestWaitEnds(t *testing.T) {
	h := newHost(t)
	before := h.state()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		p := h.launchWaiting()
		p.cmd.Process.Signal(sig)
		p.ends(0)
		h.same(sig.String()+" while it waits", before)
	}
	p := h.launchWaiting()
	if got := h.result("down"); !strings.HasPrefix(got, "exit 0\n--- stdout\nviasocks has stopped\n") {
		t.Error(got)
	}
	p.ends(0)
	h.same("down while it waits", before)
	// A proxy that says nothing: the first look has not ended yet.
	p = h.launch("--proxy", "socks5://192.0.2.77", "--wait")
	if !testkit.Until(testkit.Patience, func() bool {
		out, _ := exec.Command("ip", "-n", h.name, "route", "get", "203.0.113.1").CombinedOutput()
		return strings.Contains(string(out), "dev viasocks0")
	}) {
		t.Fatalf("the host is not closed:\n%s", p.text())
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
	h.same("SIGTERM during the first look", before)
	if strings.Contains(p.text(), "waiting for the proxy") {
		t.Errorf("the first look had ended:\n%s", p.text())
	}
	p = h.launchWaiting("--confirm", "5s")
	p.ends(1)
	if !strings.Contains(p.text(), "not confirmed in time by 'viasocks confirm'") {
		t.Error(p.text())
	}
	h.same("nobody confirmed while it waits", before)
	p = h.launchWaiting()
	p.cmd.Process.Kill()
	p.wait()
	if got := h.result("down"); !strings.HasPrefix(got, "exit 0\n") {
		t.Error(got)
	}
	h.same("kill -9 while it waits", before)
	waitsForNothing(t, h, before)
}

// waitsForNothing starts viasocks where it would wait in vain, and wants an error at once.
func waitsForNothing(t *testing.T, h *netHost, before string) {
	t.Helper()
	login, err := sockstest.Listen(
		"tcp4",
		"127.0.0.1:0",
		sockstest.WithNetns("/run/netns/"+h.name),
		sockstest.WithAuth("al", "geheim"),
	)
	if err != nil {
		t.Fatal(err)
	}
	defer login.Close()
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--wait", "--proxy", login.URL()}, "it wants a login"},
		{[]string{"--wait", "--proxy", "socks5://198.18.0.1"}, "which viasocks uses itself"},
		{[]string{"--proxy", nobodyURL}, "connection refused"}, // without --wait the error stays
	} {
		got := h.result(append([]string{"up"}, tt.args...)...)
		_, stderr, _ := strings.Cut(got, "--- stderr\n")
		if !strings.HasPrefix(got, "exit 1\n") || !strings.Contains(stderr, tt.want) ||
			strings.Contains(stderr, "waiting for the proxy") {
			t.Errorf("%s: %s", tt.args, got)
		}
		h.same(strings.Join(tt.args, " "), before)
	}
}
