package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// up and down again, in a namespace that has a route but leads nowhere: the host is as it was.
func TestUp(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("no root: the namespace and the TUN would need a user namespace")
	}
	lookPath(t, "ip")
	name := fmt.Sprintf("vstest%d", os.Getpid())
	ip := func(args string) string {
		t.Helper()
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
		return string(out)
	}
	ip("netns add " + name)
	t.Cleanup(func() { ip("netns del " + name) })
	in := "-n " + name + " "
	for _, l := range []string{"link set lo up", "link add eth0 type veth peer name eth0p", "link set eth0 addrgenmode none up",
		"link set eth0p addrgenmode none up", "addr add 192.0.2.2/24 dev eth0", "route add default via 192.0.2.1"} {
		ip(in + l)
	}
	state := func() string {
		return ip(in+"-4 rule") + ip(in+"-6 rule") + ip(in+"-4 route show table all") + ip(in+"-6 route show table all") + ip(in+"addr")
	}
	before := state()

	// The proxy is one that accepts and does nothing more than greet, inside the namespace, on loopback.
	greeter := exec.Command("ip", "netns", "exec", name, self(t), "-test.run=^TestGreeter$")
	greeter.Env = append(os.Environ(), "TEST_GREETER=1")
	lines, _ := greeter.StdoutPipe()
	hold, _ := greeter.StdinPipe()
	if err := greeter.Start(); err != nil {
		t.Fatal(err)
	}
	defer greeter.Wait()
	defer hold.Close()
	addr, err := bufio.NewReader(lines).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}

	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		cmd := viasocks("up", "--proxy", "socks5://"+strings.TrimSpace(addr))
		cmd.Args = append([]string{"ip", "netns", "exec", name, self(t)}, cmd.Args[1:]...)
		cmd.Path = lookPath(t, "ip")
		log, _ := cmd.StderrPipe()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(log)
		all := ""
		for !strings.Contains(all, "msg=ready") {
			l, err := r.ReadString('\n')
			all += l
			if err != nil {
				t.Fatalf("not ready: %s", all)
			}
		}
		if got := ip(in + "route get 203.0.113.1"); !strings.Contains(got, "dev viasocks0") {
			t.Errorf("not steered: %s", got)
		}
		second := viasocks("up", "--proxy", "socks5://"+strings.TrimSpace(addr), "--tun", "other0", "--table", "99")
		second.Args = append([]string{"ip", "netns", "exec", name, self(t)}, second.Args[1:]...)
		second.Path = cmd.Path
		if got := result(t, second); !strings.HasPrefix(got, "exit 1\n") || !strings.Contains(got, "another viasocks steers it") {
			t.Error(got)
		}
		cmd.Process.Signal(sig)
		rest, _ := io.ReadAll(r)
		cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%s: exit %d: %s%s", sig, code, all, rest)
		}
		if after := state(); after != before {
			t.Errorf("%s: before:\n%s\nafter:\n%s", sig, before, after)
		}
	}
}

// TestGreeter is no test but the proxy of TestUp.
func TestGreeter(t *testing.T) {
	if os.Getenv("TEST_GREETER") == "" {
		t.Skip("only a helper of TestUp")
	}
	fmt.Println(server(t).Addr())
	io.Copy(io.Discard, os.Stdin)
}
