package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// netHost is a network namespace that has a route but leads nowhere, and a proxy on loopback.
type netHost struct {
	t     *testing.T
	name  string
	proxy string
}

func newHost(t *testing.T) *netHost {
	t.Helper()
	if testing.Short() {
		t.Skip("the short tests make no namespaces")
	}
	if os.Getuid() != 0 {
		t.Skip("no root: the namespace and the TUN would need a user namespace")
	}
	lookPath(t, "ip")
	h := &netHost{t: t, name: fmt.Sprintf("vstest%d-%d", os.Getpid(), time.Now().UnixNano()%1e6)}
	h.run("ip netns add " + h.name)
	t.Cleanup(func() { h.run("ip netns del " + h.name) })
	for _, l := range []string{"link set lo up", "link add eth0 type veth peer name eth0p", "link set eth0 addrgenmode none up",
		"link set eth0p addrgenmode none up", "addr add 192.0.2.2/24 dev eth0", "route add default via 192.0.2.1"} {
		h.run("ip -n " + h.name + " " + l)
	}
	h.settle()
	// The proxy is one that accepts, greets and refuses, inside the namespace.
	greeter := h.in(exec.Command(self(t), "-test.run=^TestGreeter$"))
	greeter.Env = append(os.Environ(), "TEST_GREETER=1")
	lines, _ := greeter.StdoutPipe()
	hold, _ := greeter.StdinPipe()
	if err := greeter.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hold.Close(); greeter.Wait() })
	addr, err := bufio.NewReader(lines).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	h.proxy = "socks5://" + strings.TrimSpace(addr)
	return h
}

func (h *netHost) run(line string) string {
	h.t.Helper()
	args := strings.Fields(line)
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

// in has cmd run in the namespace.
func (h *netHost) in(cmd *exec.Cmd) *exec.Cmd {
	h.t.Helper()
	c := exec.Command(lookPath(h.t, "ip"), append([]string{"netns", "exec", h.name, self(h.t)}, cmd.Args[1:]...)...)
	c.Env = cmd.Env
	return c
}

func (h *netHost) viasocks(args ...string) *exec.Cmd { return h.in(viasocks(args...)) }

// result is the result of a command that ends.
func (h *netHost) result(args ...string) string { return result(h.t, h.viasocks(args...)) }

// state is everything that may change.
func (h *netHost) state() string {
	h.t.Helper()
	in := "ip -n " + h.name + " "
	s := h.run(
		in+"-4 rule",
	) + h.run(
		in+"-6 rule",
	) + h.run(
		in+"-4 route show table all",
	) + h.run(
		in+"-6 route show table all",
	) + h.run(
		in+"addr",
	)
	if _, err := exec.LookPath("nft"); err == nil {
		s += h.run("ip netns exec " + h.name + " nft -s list ruleset")
	}
	return s
}

// settle waits until the kernel has said all that it has to say of links that came up: it does so from a work queue, up to
// a second later.
func (h *netHost) settle() {
	h.t.Helper()
	in := "ip -n " + h.name + " "
	var s, six string
	if !testkit.Until(testkit.Patience, func() bool {
		s = h.run(in+"-4 route show table all") + h.run(in+"addr")
		six = h.run(in + "-6 route show table all")
		ready := strings.Count(s, "state UP") == 2 && strings.Count(six, "multicast ff00::/8") >= 2 ||
			!strings.Contains(s, "inet6")
		ready = ready && testkit.HasLocalRoutes(s, six)
		for _, word := range []string{"linkdown", "tentative", "NO-CARRIER", "state DOWN", "state LOWERLAYERDOWN"} {
			ready = ready && !strings.Contains(s+six, word)
		}
		return ready
	}) {
		h.t.Fatalf("links that do not come up:\n%s%s", s, six)
	}
}

// upProc is a `viasocks up`.
type upProc struct {
	t   *testing.T
	cmd *exec.Cmd
	mu  sync.Mutex
	log strings.Builder
	eof chan struct{}
}

// up starts it and waits until it is ready.
func (h *netHost) up(args ...string) *upProc {
	h.t.Helper()
	p := h.launch(args...)
	p.await("msg=ready")
	return p
}

func (h *netHost) launch(args ...string) *upProc {
	h.t.Helper()
	return h.launchAs(func(c *exec.Cmd) *exec.Cmd { return c }, args...)
}

// launchAs is launch of a command that how has changed.
func (h *netHost) launchAs(how func(*exec.Cmd) *exec.Cmd, args ...string) *upProc {
	h.t.Helper()
	p := &upProc{t: h.t, cmd: how(h.viasocks(append([]string{"up"}, args...)...)), eof: make(chan struct{})}
	r, err := p.cmd.StderrPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() {
		defer close(p.eof)
		for s := bufio.NewReader(r); ; {
			l, err := s.ReadString('\n')
			p.mu.Lock()
			p.log.WriteString(l)
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	h.t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.wait()
			h.result("down")
		}
	})
	return p
}

func (p *upProc) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// await waits for a line of the log.
func (p *upProc) await(what string) {
	p.t.Helper()
	ended := false
	if !testkit.Until(2*testkit.Patience, func() bool {
		select {
		case <-p.eof:
			ended = true
		default:
		}
		return ended || strings.Contains(p.text(), what)
	}) {
		p.t.Fatalf("no %q:\n%s", what, p.text())
	} else if ended && !strings.Contains(p.text(), what) {
		p.t.Fatalf("it ended without %q:\n%s", what, p.text())
	}
}

// wait gives the exit status.
func (p *upProc) wait() int {
	<-p.eof
	p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

func (p *upProc) ends(want int) {
	p.t.Helper()
	if code := p.wait(); code != want {
		p.t.Errorf("exit %d, want %d:\n%s", code, want, p.text())
	}
}

// same wants the state of before. The kernel takes an address's routes away a little after the address.
func (h *netHost) same(what, before string) {
	h.t.Helper()
	after := h.state()
	if !testkit.Until(testkit.Patience, func() bool { after = h.state(); return after == before }) {
		h.t.Errorf("%s: before:\n%s\nafter:\n%s", what, before, after)
	}
}

// TestGreeter is no test but the proxy of those above.
func TestGreeter(t *testing.T) {
	if os.Getenv("TEST_GREETER") == "" {
		t.Skip("only a helper of TestUp")
	}
	fmt.Println(server(t).Addr())
	io.Copy(io.Discard, os.Stdin)
}
