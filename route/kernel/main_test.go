package kernel

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// noNamespace says why there are none; empty when there are.
var noNamespace string

// TestMain enters a user namespace where root is missing, so that the tests can make network namespaces.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == openSocket {
		os.Exit(socketMain(os.Args[2], os.Args[3]))
	}
	if r, w, err := os.Pipe(); err == nil { // the runtime's poller has files of its own, from the first use on
		r.Close()
		w.Close()
	}
	if flag.Parse(); testing.Short() {
		noNamespace = "the short tests make none"
		os.Exit(m.Run())
	}
	if os.Getuid() == 0 {
		cmd := exec.Command("ip", "-V")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if err := cmd.Run(); err != nil { // root in a container without the privilege, or no ip(8)
			noNamespace = err.Error()
		}
		os.Exit(m.Run())
	}
	if os.Getenv("IN_USER_NAMESPACE") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), "IN_USER_NAMESPACE=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		err := cmd.Run()
		if _, ran := err.(*exec.ExitError); err == nil || ran {
			os.Exit(cmd.ProcessState.ExitCode())
		}
		noNamespace = "no root, and no user namespace: " + err.Error()
	}
	os.Exit(m.Run())
}

// inNamespace runs the rest of the test on a thread of its own in a new network namespace with a private network, a
// public one, a default route, and a device in place of a TUN. It ends with a check that nothing is left open.
func inNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if noNamespace != "" {
		t.Skip("cannot make a network namespace: " + noNamespace)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and the namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("cannot make a network namespace: %v", err)
			return
		}
		ip(t, "link set lo up",
			"link add eth0 type veth peer name eth0p", "link set eth0 addrgenmode none up", "link set eth0p addrgenmode none up",
			"addr add 198.51.100.2/24 dev eth0", "addr add 2001:db8:1::2/64 dev eth0 nodad",
			"route add default via 198.51.100.1", "route add default via 2001:db8:1::1",
			"link add br0 type veth peer name br0p", "link set br0 addrgenmode none up", "link set br0p addrgenmode none up",
			"addr add 192.168.7.1/24 dev br0", "addr add fd12:3456::1/64 dev br0 nodad")
		settled(t)
		if t.Failed() {
			return
		}
		fds := testkit.CountFiles(t)
		defer delete(ends, t)
		f(t)
		for _, end := range slices.Backward(ends[t]) {
			end()
		}
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
		if now := 0; !testkit.Until(testkit.Patience, func() bool { // whoever reads a connection closes it
			now = testkit.CountFiles(t)
			return now == fds
		}) {
			t.Errorf("%d open files before, %d after", fds, now)
		}
	}()
	<-done
}

// ip runs ip(8) for each line and gives what they printed.
func ip(t *testing.T, lines ...string) string {
	t.Helper()
	var out strings.Builder
	for _, l := range lines {
		b, err := exec.Command("ip", strings.Fields(l)...).CombinedOutput()
		if err != nil {
			t.Errorf("ip %s: %v: %s", l, err, b)
		}
		out.Write(b)
	}
	return out.String()
}

// settled waits until links that are up carry packets, and the kernel's tables say so: it does that up to a second after
// the other end came up, and until then a link has no IPv6. The routes to the host's own IPv6 addresses come later still.
func settled(t *testing.T) {
	t.Helper()
	last := ""
	testkit.Eventually(t, "links that are up", func() bool {
		routes, addrs := ip(t, "-4 route show table all", "-6 route show table all"), ip(t, "addr")
		same := last == routes+addrs
		last = routes + addrs
		for _, word := range []string{"linkdown", "tentative", "NO-CARRIER", "state DOWN", "state LOWERLAYERDOWN"} {
			if strings.Contains(last, word) {
				return false
			}
		}
		return same && testkit.HasLocalRoutes(addrs, routes)
	})
}

// noted is what the filter itself puts into its sets.
var noted = regexp.MustCompile(`(?s)(set (?:spoke|served|came|fwd_|dhcp)\w* \{[^}]*?)\n\s*elements = \{.*?\}`)

// state is everything that Steer may change.
func state(t *testing.T) string {
	t.Helper()
	s := ""
	for _, l := range []string{"-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all", "addr"} {
		s += fmt.Sprintf("# ip %s\n%s", l, ip(t, l))
	}
	b, err := exec.Command("nft", "-s", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Errorf("nft: %v: %s", err, b)
	}
	s += "# nft\n" + noted.ReplaceAllString(string(b), "$1")
	b, _ = exec.Command("sysctl", "-a", "--pattern", "^net\\.ipv4\\.conf\\.(all|default)").Output()
	return s + "# sysctl\n" + string(b)
}

// difference is the lines that only one of two states has.
func difference(before, after string) string {
	a, b := strings.Split(before, "\n"), strings.Split(after, "\n")
	var out strings.Builder
	for _, l := range a {
		if !slices.Contains(b, l) {
			out.WriteString("\n- " + l)
		}
	}
	for _, l := range b {
		if !slices.Contains(a, l) {
			out.WriteString("\n+ " + l)
		}
	}
	return out.String()
}
