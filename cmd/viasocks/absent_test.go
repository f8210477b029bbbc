package main

import (
	"strings"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A host starts without an upstream that only a rule names. The log and the status say that it is not there, until it is.
func TestUpWithoutAnUpstream(t *testing.T) {
	h := newHost(t)
	before := h.state()
	const nobody = "127.0.0.1:9"
	warning := "the upstream b did not answer when it was last checked: cannot reach the proxy " + nobody + ": connection refused"
	p := h.up("--proxy", h.proxy, "--wait", "--upstream", "b=socks5://"+nobody, "--rule", "dst 203.0.113.0/24 via b")
	if n := strings.Count(p.text(), `msg="an upstream does not answer`); n != 1 {
		t.Errorf("the log says it %d times:\n%s", n, p.text())
	}
	if got := h.result("status"); !strings.HasPrefix(got, "exit 0\n") || !strings.Contains(got, warning) ||
		!strings.Contains(got, nobody+"      TCP down") {
		t.Error(got)
	}
	if got := h.result("health"); !strings.HasPrefix(got, "exit 0\n") {
		t.Error(got)
	}
	b, err := sockstest.Listen("tcp4", nobody, sockstest.WithNetns("/run/netns/"+h.name))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	testkit.Eventually(t, "the end of the warning", func() bool {
		h.result("health") // checks all, once a second
		got := h.result("status")
		return strings.HasPrefix(got, "exit 0\n") && !strings.Contains(got, "did not answer") &&
			!strings.Contains(got, "TCP down")
	})
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
	h.same("the end", before)
}
