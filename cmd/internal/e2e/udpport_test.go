package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestUDPPort: a program that has sent nothing asks for a UDP port by NAT-PMP, and a peer reaches it there. TCP gets the same
// number. After a restart of dante the port is another one, which the program, the command of --on-port and status learn.
func TestUDPPort(t *testing.T) {
	needPrograms(t, "danted", "natpmpc")
	stop := danteServer(t, "1086")
	hook := filepath.Join(t.TempDir(), "hook")
	told := hook + ".told"
	script := "#!/bin/sh\n" +
		"echo $VIASOCKS_LISTEN_PROTO $VIASOCKS_LISTEN_PORT $VIASOCKS_OUTER_ADDRESS:$VIASOCKS_OUTER_PORT >>" + told + "\n"
	if err := os.WriteFile(hook, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	a := startApp(t, "--proxy", "socks5://127.0.0.1:1086", "--listen", "auto", "--on-port", hook)
	c := a.boundUDP(6885)
	first := a.udpPort(6885, "")
	reach(t, c, first)
	if got, _ := a.run("natpmpc", "-a", "6885", "6885", "tcp", "600"); !strings.Contains(got,
		fmt.Sprintf("Mapped public port %d protocol TCP to local port 6885", first.Port())) {
		t.Errorf("TCP does not get the number of UDP, %d: %s", first.Port(), got)
	}
	stop()
	danteServer(t, "1086")
	second := a.udpPort(6885, first.String())
	reach(t, c, second)
	testkit.Eventually(t, "the command", func() bool {
		b, _ := os.ReadFile(told)
		return strings.Contains(string(b), "udp 6885 "+first.String()) && strings.Contains(string(b), "udp 6885 "+second.String())
	})
	if out, err := exec.Command(viasocks, "status", "--pid", fmt.Sprint(a.cmd.Process.Pid)).CombinedOutput(); err != nil ||
		!strings.Contains(string(out), fmt.Sprintf("peers reach port 6885/udp at %v by proxy\n", second)) {
		t.Errorf("status: %v: %s", err, out)
	}
	if got, _ := a.run("natpmpc", "-a", "0", "6885", "udp", "0"); !strings.Contains(got, "Mapped public port 0 protocol UDP") {
		t.Errorf("the end of the port: %s", got)
	}
	testkit.Eventually(t, "the end of the port", func() bool { return a.udpStatus(6885) == nil })
}

// TestUDPPortUPnP: by UPnP the program gets the port if it takes any, and otherwise the error 718. A port of --listen PORT/udp
// is there without a question.
func TestUDPPortUPnP(t *testing.T) {
	needPrograms(t, "danted", "upnpc")
	danteServer(t, "1086")
	a := startApp(t, "--proxy", "socks5://127.0.0.1:1086", "--listen", "auto", "--listen", "6886/udp")
	c := a.boundUDP(6886)
	var user *control.ListeningPort
	testkit.Eventually(t, "the user's port", func() bool { user = a.udpStatus(6886); return user != nil && user.Outer != "" })
	reach(t, c, netip.MustParseAddrPort(user.Outer))
	upnp := func(args ...string) string {
		got, _ := a.run("upnpc", append([]string{"-i"}, args...)...)
		return got
	}
	got := upnp("-n", "198.18.0.1", "6885", "6885", "UDP")
	if !strings.Contains(got, "is redirected to internal 198.18.0.1:6885") {
		t.Errorf("any port: %s", got)
	}
	p := a.udpStatus(6885)
	if p == nil || p.Outer == "" {
		t.Fatalf("%+v", p)
	}
	reach(t, a.boundUDP(6885), netip.MustParseAddrPort(p.Outer))
	entry := fmt.Sprintf(" UDP %5d->198.18.0.1:6885 ", netip.MustParseAddrPort(p.Outer).Port())
	if got := upnp("-l"); !strings.Contains(got, entry) {
		t.Errorf("the list: %s", got)
	}
	if got := upnp("-a", "198.18.0.1", "6887", "7", "UDP"); !strings.Contains(got, "failed with code 718") {
		t.Errorf("another port than that of the proxy: %s", got)
	}
}

// danteServer starts a dante whose outer address is world4, or others, until stop is called.
func danteServer(t *testing.T, port string, externals ...string) (stop func()) {
	if externals == nil {
		externals = []string{world4}
	}
	return serve(t, "127.0.0.1:"+port, "danted", "-p", filepath.Join(t.TempDir(), "pid"), "-f", writeFile(t, "conf",
		`logoutput: stderr
internal: 127.0.0.1 port = `+port+`
external: `+strings.Join(externals, "\nexternal: ")+`
clientmethod: none
socksmethod: none
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 command: connect bind udpassociate }
socks pass { from: 0/0 to: 0/0 command: bindreply udpreply }
`))
}

// boundUDP returns a socket of the program at this port.
func (a *app) boundUDP(port uint16) net.PacketConn {
	a.t.Helper()
	fd := a.socket(unix.AF_INET, unix.SOCK_DGRAM)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}); err != nil {
		a.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "udp")
	defer f.Close()
	c, err := net.FilePacketConn(f)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { c.Close() })
	return c
}

// udpStatus returns what status says about a UDP port, or nil.
func (a *app) udpStatus(port uint16) *control.ListeningPort {
	a.t.Helper()
	for _, p := range a.status().Listening.Ports {
		if p.Proto == "udp" && p.Port == port {
			return &p
		}
	}
	return nil
}

// udpPort asks for a UDP port by NAT-PMP until it is another one than before, and returns where it is reached.
func (a *app) udpPort(port uint16, before string) netip.AddrPort {
	a.t.Helper()
	var at netip.AddrPort
	testkit.Eventually(a.t, "a UDP port", func() bool {
		got, _ := a.run("natpmpc", "-a", "0", fmt.Sprint(port), "udp", "600")
		_, rest, ok := strings.Cut(got, "Mapped public port ")
		var outer uint16
		if n, _ := fmt.Sscanf(rest, "%d protocol UDP", &outer); !ok || n != 1 {
			return false
		}
		at = netip.AddrPortFrom(netip.MustParseAddr(world4), outer)
		return at.String() != before
	})
	return at
}

// reach sends a datagram from outside to an outer endpoint, and expects the program to get it from its true sender and to reach
// that one with an answer.
func reach(t *testing.T, c net.PacketConn, at netip.AddrPort) {
	t.Helper()
	peer, err := net.ListenPacket("udp4", other4+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	b := make([]byte, 1500)
	one := func(what string, from, to net.PacketConn, where, want net.Addr) {
		t.Helper()
		if _, err := from.WriteTo([]byte(what), where); err != nil {
			t.Fatal(err)
		}
		_ = to.SetReadDeadline(time.Now().Add(testkit.Patience))
		n, sender, err := to.ReadFrom(b)
		if err != nil || string(b[:n]) != what || sender.String() != want.String() {
			t.Fatalf("%q from %v, %v; want %q from %v", b[:n], sender, err, what, want)
		}
	}
	outer := net.UDPAddrFromAddrPort(at)
	one("from a peer", peer, c, outer, peer.LocalAddr())
	one("an answer", c, peer, peer.LocalAddr(), outer)
}
