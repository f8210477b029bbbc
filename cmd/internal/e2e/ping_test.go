package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// Destinations of ping, in both families.
var (
	unreachable = [...]string{"192.0.2.4", "2001:db8::4"} // the proxy says so
	mute        = [...]string{"192.0.2.5", "2001:db8::5"} // the proxy says nothing
	prohibited  = [...]string{"192.0.2.6", "2001:db8::6"} // by a rule
	there       = [...]string{world4, world6}
	closed      = [...]string{other4, other6} // nobody listens
)

// pingProxy is a proxy for these destinations, at which the name pinged.example is that of the first one.
func pingProxy(t *testing.T) *sockstest.Server {
	proxy := listenSOCKS(t, sockstest.WithResolve(func(name string) (netip.Addr, error) {
		if name != "pinged.example" {
			return netip.Addr{}, fmt.Errorf("%q is not known", name)
		}
		return netip.MustParseAddr(world4), nil
	}))
	proxy.SetFault(func(r sockstest.Request) sockstest.Fault {
		switch r.Dst.IP.String() {
		case unreachable[0], unreachable[1]:
			return sockstest.Reply(4)
		case mute[0], mute[1]:
			return sockstest.Silence()
		}
		return sockstest.Fault{}
	})
	return proxy
}

// runPing runs ping under viasocks run.
func runPing(t *testing.T, uid int, dir string, flags []string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(viasocks, append(append(append([]string{"run"}, flags...), "--", "ping", "-n"), args...)...)
	cmd.Env, cmd.Dir = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir, "LC_ALL=C"}, dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	return output(cmd)
}

func needPing(t *testing.T) {
	needWorld(t)
	if _, err := exec.LookPath("ping"); err != nil {
		t.Skip(err)
	}
}

// TestPing: the ping of iputils sees a host that grants or refuses TCP, an unreachable one as such, and nothing of a silent
// one, as root and as an ordinary user. Without --ping it sees nothing at all.
func TestPing(t *testing.T) {
	if !apart(t) {
		return
	}
	needPing(t)
	asUsers(t, func(t *testing.T, uid int, dir string) {
		for i := range there {
			proxy := pingProxy(t)
			l, at := listenTCP(t, there[i])
			defer l.Close()
			flags := []string{"--proxy", proxy.URL(), "--ping", fmt.Sprintf("9,%d", at.Port()), "--rule",
				"dst " + prohibited[i] + " reject", "--rule", "via proxy"}
			answered := func(dst string, args ...string) {
				t.Helper()
				out, err := runPing(t, uid, dir, flags, append(args, "-c", "3", "-i", "0.2", "-W", "30", dst)...)
				if err != nil || !strings.Contains(out, "3 received") || strings.Contains(out, "wrong data") ||
					strings.Contains(out, "DUP") {
					t.Errorf("ping %s: %v\n%s", dst, err, out)
				}
			}
			answered(there[i])
			answered(there[i], "-s", "1400", "-p", "76696173")
			answered(closed[i])
			for dst, want := range map[string][2]string{
				unreachable[i]: {"Destination Host Unreachable", "Destination unreachable: Address unreachable"},
				prohibited[i]:  {"Packet filtered", "Destination unreachable: Administratively prohibited"},
			} {
				out, err := runPing(t, uid, dir, flags, "-c", "1", "-W", "30", dst)
				if err == nil || !strings.Contains(out, want[i]) {
					t.Errorf("ping %s: %v\n%s", dst, err, out)
				}
			}
			for _, silent := range [][]string{flags, {"--proxy", proxy.URL()}} {
				out, err := runPing(t, uid, dir, silent, "-c", "1", "-W", "1", mute[i])
				if err == nil || !strings.Contains(out, "100% packet loss") || strings.Contains(out, "nreachable") {
					t.Errorf("ping %s with %q: %v\n%s", mute[i], silent, err, out)
				}
			}
		}
	})
}

// TestPingName: with fake addresses, the proxy is asked for the name.
func TestPingName(t *testing.T) {
	needPing(t)
	testkit.CheckLeaks(t)
	proxy := pingProxy(t)
	out, err := runPing(t, os.Getuid(), t.TempDir(), []string{"--proxy", proxy.URL(), "--ping", "9"}, "-c", "1", "-W", "30",
		"pinged.example")
	if err != nil || !strings.Contains(out, "1 received") {
		t.Errorf("ping: %v\n%s", err, out)
	}
	if r := proxy.Requests(); len(r) != 1 || r[0].Dst.Name != "pinged.example" || r[0].Dst.Port != 9 {
		t.Errorf("the proxy was asked for %+v", r)
	}
}

// TestPingFlood: 1,000 echo requests at once, to a host that is there and to one that is silent, cost the proxy one connection in
// a second for each port.
func TestPingFlood(t *testing.T) {
	needPing(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, for ping -l")
	}
	testkit.CheckLeaks(t)
	for _, dst := range []string{closed[0], closed[1], mute[0], mute[1]} {
		testkit.Tries(t, "ping "+dst, func() error { return pingFlood(t, dst) }) // ping waits 1 s for the first answer
	}
}

func pingFlood(t *testing.T, dst string) error {
	t.Helper()
	proxy := pingProxy(t)
	start := time.Now()
	flags := []string{"--proxy", proxy.URL(), "--ping", "9,10"}
	out, err := runPing(t, 0, t.TempDir(), flags, "-q", "-f", "-l", "1000", "-c", "1000", "-W", "1", dst)
	took := time.Since(start)
	silent := dst == mute[0] || dst == mute[1]
	if !strings.Contains(out, "1000 packets transmitted") || silent != strings.Contains(out, " 0 received") {
		return fmt.Errorf("%v\n%s", err, out)
	}
	if n, most := len(proxy.Requests()), 2*(int(took/time.Second)+2); n == 0 || n > most {
		return fmt.Errorf("the proxy was asked %d times in %v", n, took)
	}
	t.Logf("ping %s: %d requests in %v\n%s", dst, len(proxy.Requests()), took, out)
	return nil
}
