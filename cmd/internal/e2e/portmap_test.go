package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestNATPMP: a real client of NAT-PMP finds its gateway, the proxy's address and a port, which works, and gives it up.
func TestNATPMP(t *testing.T) {
	if !apart(t) {
		return
	}
	url := binding(t)
	needPrograms(t, "natpmpc")
	a := startApp(t, "--proxy", url, "--listen", "auto")
	l, port := a.listen(6885), freePort(t)
	outer := fmt.Sprint(port)
	ask := func(args ...string) string {
		out, _ := a.run("natpmpc", args...)
		return out
	}
	if got := ask(); !strings.Contains(got, "using gateway : 198.18.0.2") ||
		!strings.Contains(got, "Public IP address : "+world4) {
		t.Fatalf("the address: %s", got)
	}
	mapped := "Mapped public port " + outer + " protocol TCP to local port 6885 liftime 120"
	if got := ask("-a", outer, "6885", "tcp", "600"); !strings.Contains(got, mapped) {
		t.Fatalf("the port: %s", got)
	}
	c := peer(t, world4+":"+outer)
	sendBoth(t, c, acceptFrom(t, l, c))
	gone := "Mapped public port 0 protocol TCP to local port 6885 liftime 0"
	if got := ask("-a", "0", "6885", "tcp", "0"); !strings.Contains(got, gone) {
		t.Errorf("the end of the port: %s", got)
	}
	testkit.Eventually(t, "the end of its BIND", func() bool { return len(a.status().Listening.Ports) == 0 })

	b := startApp(t, "--proxy", url, "--listen", "6887")
	if got, _ := b.run("natpmpc", "-a", "6888", "6888", "tcp", "600"); !strings.Contains(got, "not authorized") {
		t.Errorf("a port that the user does not name: %s", got)
	}
	none := startApp(t, "--proxy", url)
	if got, _ := none.run("natpmpc"); strings.Contains(got, "Public IP address") {
		t.Errorf("without --listen: %s", got)
	}
}

// TestForwardedPort: a program learns of the port that the user names, and status says which one has it. The proxy need not
// know BIND.
func TestForwardedPort(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "natpmpc", "upnpc")
	a := startApp(t, "--proxy", listenSOCKS(t).URL(), "--forwarded-port", other4+":50000")
	if got, _ := a.run("natpmpc", "-a", "6885", "6885", "udp", "600"); !strings.Contains(got, "Public IP address : "+other4) ||
		!strings.Contains(got, "Mapped public port 50000 protocol UDP to local port 6885 liftime 120") {
		t.Errorf("natpmpc: %s", got)
	}
	if got, _ := a.run("upnpc", "-i", "-a", "198.18.0.1", "6885", "50000", "TCP"); !strings.Contains(got,
		other4+":50000 TCP is redirected to internal 198.18.0.1:6885") {
		t.Errorf("upnpc: %s", got)
	}
	out, err := exec.Command(viasocks, "status", "--pid", strconv.Itoa(a.cmd.Process.Pid)).CombinedOutput()
	if want := "port 50000/udp of " + other4 + ", told to port 6885 of the program"; err != nil ||
		!strings.Contains(string(out), want) {
		t.Errorf("status: %v: %s", err, out)
	}
}

// run runs a program in the app's namespaces. It tries again if viasocks does not answer within two seconds.
func (a *app) run(name string, args ...string) (said string, err error) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	testkit.Until(testkit.Patience, func() bool {
		log := &harness.Log{}
		words := append([]string{"exec", strconv.Itoa(a.cmd.Process.Pid), "--", name}, args...)
		cmd := exec.CommandContext(ctx, viasocks, words...)
		cmd.Stdout, cmd.Stderr = log, log
		err = cmd.Run()
		said = log.String()
		return !strings.Contains(said, "it does not answer")
	})
	return said, err
}
