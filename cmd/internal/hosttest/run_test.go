package hosttest

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// runAgent is an agent under `viasocks run` in the host namespace.
func (w *world) runAgent(flags ...string) (*agent, *harness.Log) {
	w.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	log := &harness.Log{}
	cmd := exec.Command(viasocks, append(append([]string{"run", "--log-level", "info"}, flags...), "--", exe)...)
	cmd.Stdout, cmd.Stderr = log, log
	a := &agent{fd: -1}
	if err := a.launch(w, cmd); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("viasocks run said:\n%s", harness.Tail(log.String(), 40))
		}
	})
	return a, log
}

// udp is a UDP socket of the agent.
func (a *agent) udp(w *world) *net.UDPConn {
	w.t.Helper()
	fd, err := a.socket(unix.AF_INET, unix.SOCK_DGRAM)
	if err != nil {
		w.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "agent")
	defer f.Close()
	c, err := net.FilePacketConn(f)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

// TestRunNetworkChanges: the host gets another address on another device, and what the program of `run` sends by UDP is carried
// again soon.
func TestRunNetworkChanges(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.proxy(proxy4 + ":1080")
	far := w.packets("world", "203.0.113.9:79")
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := far.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = far.WriteTo(b[:n], from)
		}
	}()
	w.ip("router", `link add host1 type veth peer name eth1 netns host
link set host1 up
addr add 10.78.0.1/24 dev host1`)
	w.ip("host", "link set eth1 up")
	a, _ := w.runAgent("--proxy", "socks5://"+proxy4+":1080")
	c := a.udp(w)
	answered := func() bool {
		if _, err := c.WriteTo([]byte("ping"), net.UDPAddrFromAddrPort(netip.MustParseAddrPort("203.0.113.9:79"))); err != nil {
			return false
		}
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		_, _, err := c.ReadFrom(make([]byte, 100))
		return err == nil
	}
	w.eventually(30*time.Second, "UDP is carried", answered)
	for _, move := range []string{
		"-4 addr flush dev eth0\naddr add 10.78.0.2/24 dev eth1\nroute add default via 10.78.0.1 dev eth1",
		"-4 addr flush dev eth1\naddr add " + host4 + "/24 dev eth0\nroute add default via " + router4 + " dev eth0",
	} {
		w.ip("host", move)
		w.eventually(testkit.Patience, "UDP is carried after the host's address is another one", answered)
	}
}
