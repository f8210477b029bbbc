package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// far is a server behind the gateway of a netHost, in a namespace of its own; it greets.
func (h *netHost) far() {
	h.t.Helper()
	w := h.name + "w"
	h.run("ip netns add " + w)
	h.t.Cleanup(func() { h.run("ip netns del " + w) })
	h.run("ip -n " + h.name + " link set eth0p netns " + w)
	for _, l := range []string{"link set lo up", "link set eth0p addrgenmode none up", "addr add 192.0.2.1/24 dev eth0p",
		"addr add 203.0.113.9/32 dev lo"} {
		h.run("ip -n " + w + " " + l)
	}
	srv := exec.Command("ip", "netns", "exec", w, "socat", "TCP-LISTEN:7777,fork,reuseaddr", "SYSTEM:echo hello")
	h.start(srv)
}

// start starts a program that ends with the test.
func (h *netHost) start(cmd *exec.Cmd) *exec.Cmd {
	h.t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
	})
	return cmd
}

// hello is what a program of nobody's gets from the far server by way of viasocks.
func (h *netHost) hello() string {
	out, _ := exec.Command("ip", "netns", "exec", h.name, "setpriv", "--reuid=65534", "--clear-groups",
		"socat", "-u", "-T5", "TCP:203.0.113.9:7777,connect-timeout=10", "-").CombinedOutput()
	return string(out)
}

// microsocks runs the proxy in the host, as a user and in a control group, and waits until it listens.
func (h *netHost) microsocks(uid, cgroup string) *exec.Cmd {
	h.t.Helper()
	args := []string{"nsenter", "--net=/run/netns/" + h.name, "setpriv", "--reuid=" + uid, "--clear-groups",
		"microsocks", "-i", "127.0.0.1", "-p", "1080"}
	if cgroup != "" {
		args = append([]string{"sh", "-c", "echo $$ >" + cgroup + "/cgroup.procs && exec \"$@\"", "sh"}, args...)
	}
	cmd := h.start(exec.Command(args[0], args[1:]...))
	testkit.Eventually(h.t, "microsocks to listen", func() bool {
		return strings.Contains(h.run("ip netns exec "+h.name+" ss -Htln sport = :1080"), ":1080")
	})
	return cmd
}

// A proxy on the steered host itself: its own connections must not come back to it.
func TestProxyOnThisHost(t *testing.T) {
	for _, program := range []string{"microsocks", "socat", "ss", "setpriv", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	t.Run("a user of its own", proxyOfItsUser)
	t.Run("a service, restarted", proxyRestarted)
	t.Run("a user who is somebody", proxyOfSomebody)
	t.Run("started later", proxyStartedLater)
}

var onThisHost = []string{"--proxy", "socks5://127.0.0.1:1080"}

func stopUp(p *upProc) {
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
}

func proxyOfItsUser(t *testing.T) {
	h := newHost(t)
	h.far()
	h.microsocks("543", "")
	before := h.state()
	p := h.up(onThisHost...)
	if got := h.hello(); got != "hello\n" {
		t.Errorf("got %q\n%s", got, p.text())
	}
	if s := h.result("status"); !strings.Contains(s, "of user 543") ||
		!strings.Contains(p.text(), "what it sends goes past viasocks") {
		t.Errorf("nothing said:\n%s\n%s", s, p.text())
	}
	stopUp(p)
	h.same("down", before)
}

func proxyRestarted(t *testing.T) {
	mount := cgroup2Mount(t)
	if mount == "" {
		t.Skip("no control groups of version 2")
	}
	h := newHost(t)
	h.far()
	group := filepath.Join(mount, h.name+".service")
	service := func() *exec.Cmd {
		if err := os.Mkdir(group, 0o755); err != nil {
			t.Fatal(err)
		}
		return h.microsocks("0", group)
	}
	end := func(cmd *exec.Cmd) {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
		testkit.Until(testkit.Patience, func() bool { return os.Remove(group) == nil }) // its last process has gone
	}
	m := service()
	defer func() { end(m) }()
	// Not by ip-netns(8), which hides the control groups.
	p := h.launchAs(func(c *exec.Cmd) *exec.Cmd {
		c.Path, _ = exec.LookPath("nsenter")
		c.Args = append([]string{"nsenter", "--net=/run/netns/" + h.name}, c.Args[4:]...)
		return c
	}, onThisHost...)
	p.await("msg=ready")
	if got := h.hello(); got != "hello\n" {
		t.Errorf("got %q\n%s", got, p.text())
	}
	if s := h.result("status"); !strings.Contains(s, "of control group "+h.name+".service") {
		t.Errorf("status does not say so:\n%s", s)
	}
	end(m)
	m = service() // its control group has another inode now
	if !testkit.Until(testkit.Patience, func() bool { return h.hello() == "hello\n" }) {
		t.Fatalf("the restarted service does not work:\n%s", p.text())
	}
	stopUp(p)
}

func proxyOfSomebody(t *testing.T) {
	h := newHost(t)
	h.far()
	h.microsocks("4242", "")
	p := h.up(onThisHost...)
	start := time.Now()
	if got := h.hello(); got == "hello\n" {
		t.Error("it went past viasocks by itself")
	}
	p.await("its own connections come back to it")
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("the program waited for %v", took)
	}
	if s := h.result("status"); !strings.Contains(s, "--exclude-uid 4242") {
		t.Errorf("status does not say so:\n%s", s)
	}
	stopUp(p)
	p = h.up(append(slices.Clone(onThisHost), "--exclude-uid", "4242")...)
	if got := h.hello(); got != "hello\n" {
		t.Errorf("excluded: got %q\n%s", got, p.text())
	}
	stopUp(p)
}

func proxyStartedLater(t *testing.T) {
	h := newHost(t)
	h.far()
	p := h.launch(append(slices.Clone(onThisHost), "--wait")...)
	p.await("waiting for the proxy")
	h.microsocks("543", "")
	p.await("msg=ready")
	if !testkit.Until(testkit.Patience, func() bool { return h.hello() == "hello\n" }) {
		t.Fatalf("does not work:\n%s", p.text())
	}
	if s := h.result("status"); !strings.Contains(s, "of user 543") {
		t.Errorf("status does not say so:\n%s", s)
	}
	stopUp(p)
}

// cgroup2Mount is where control groups of version 2 are mounted and can be made; "": nowhere.
func cgroup2Mount(t *testing.T) string {
	t.Helper()
	for _, m := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(m, "cgroup.procs")); err == nil {
			dir := filepath.Join(m, fmt.Sprintf("viasocks-test-%d", os.Getpid()))
			if os.Mkdir(dir, 0o755) == nil {
				os.Remove(dir)
				return m
			}
		}
	}
	return ""
}
