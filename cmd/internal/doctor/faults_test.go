package doctor

import (
	"net"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
)

// A host and a proxy at which nothing is wrong.
func TestHealthy(t *testing.T) {
	needWorld(t)
	r := examine(t, "--proxy", "socks5://"+proxyAt(t, nil).Addr().String())
	r.onlyFaults(t)
	for _, check := range []string{
		"kernel", tunNode, "viasocks run", "viasocks up", "state", "ip rules", "reached", "packet size", "errors", "names", "UDP",
	} {
		r.is(t, check, OK)
	}
	r.is(t, "the far end", NotTested, "viasocks doctor --serve", "--peer")
	if r.Seconds > 8 {
		t.Errorf("it took %v s", r.Seconds)
	}
}

func TestNoTUN(t *testing.T) {
	needWorld(t)
	if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, ""); err != nil {
		t.Skip(err)
	}
	defer unix.Unmount("/dev/net", unix.MNT_DETACH)
	r := examine(t)
	r.is(t, tunNode, Fault, "does not exist", "modprobe tun", "--device /dev/net/tun", "viasocks run")
	r.is(t, "viasocks run", Fault, "above")
	r.onlyFaults(t, tunNode, "viasocks_run")
}

// asNobody runs doctor as a user without privilege, in a user namespace of which root is that of this test. before is what
// that root
// does first.
func asNobody(t *testing.T, before string) result {
	t.Helper()
	for _, program := range []string{"setpriv", "sh"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	tunForAll(t)
	cmd := exec.Command(
		"sh",
		"-ec",
		before+"\n"+`exec setpriv --reuid=65534 --regid=65534 --clear-groups "$0" doctor --json`,
		viasocks,
	)
	cmd.Dir = "/"
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}, {ContainerID: 65534, HostID: 65534, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
	}
	return run(t, cmd)
}

func TestClosedUserNamespaces(t *testing.T) {
	needWorld(t)
	if syscall.Getuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	r := asNobody(t, "echo 0 >/proc/sys/user/max_user_namespaces")
	r.is(t, "user namespaces", Fault, "user.max_user_namespaces=0", "sysctl -w user.max_user_namespaces=10000", "needs root")
	r.is(t, "viasocks run", Fault, "above")
	r.is(t, "viasocks up", NotTested, "sudo viasocks doctor")
	r.is(t, tunNode, OK)
	r.onlyFaults(t, "user_namespaces", "viasocks_run")

	r = asNobody(t, "")
	r.is(t, "user namespaces", OK)
	r.is(t, "viasocks run", OK, "tried")
	r.onlyFaults(t)
}

func TestWrongPassword(t *testing.T) {
	needWorld(t)
	s := proxyAt(t, nil, sockstest.WithAuth("al", "geheim"))
	r := examine(t, "--proxy", "socks5://al:wrong@"+s.Addr().String())
	r.is(t, "reached", OK)
	r.is(t, "login", Fault, "refused the user or the password", "--password-file FILE", "socks5://al@"+s.Addr().String())
	r.onlyFaults(t, "login")
	r = examine(t, "--proxy", "socks5://"+s.Addr().String())
	r.is(t, "login", Fault, "wants a login", "socks5://USER@")
	r = examine(t, "--proxy", "socks5://al:geheim@"+s.Addr().String())
	r.is(t, "login", OK)
	r.onlyFaults(t)
}

func TestProxyDown(t *testing.T) {
	needWorld(t)
	r := examine(t, "--proxy", "socks5://"+there4+":9")
	r.is(t, "reached", Fault, "connection refused", "start the proxy", "ss -ltn")
	r.onlyFaults(t, "reached")
	r = examine(t, "--proxy", "socks5://198.51.100.77:1080") // nobody has the address
	r.is(t, "reached", Fault, "check the address")
	r = examine(t, "--proxy", "socks5://no-such-proxy.invalid:1080")
	r.is(t, "reached", Fault, "correct the name")
}

func TestNoUDP(t *testing.T) {
	needWorld(t)
	for name, fault := range map[string]sockstest.Fault{"reply 7": sockstest.Reply(7), "FIN": sockstest.EarlyClose()} {
		t.Run(name, func(t *testing.T) {
			s := proxyAt(t, func(r sockstest.Request) sockstest.Fault {
				if r.Cmd == sockstest.CmdAssociate {
					return fault
				}
				return sockstest.Fault{}
			})
			r := examine(t, "--proxy", "socks5://"+s.Addr().String())
			r.is(t, "UDP", Warning, "has no UDP", "DHT", "QUIC", "--enable-dht=false")
			r.onlyFaults(t)
		})
	}
	r := examine(t, "--proxy", "socks4a://"+proxyAt(t, nil).Addr().String())
	r.is(t, "UDP", Warning, "SOCKS4a", "has no UDP")
}

// grant says yes to everything and dials nobody.
func grant(r sockstest.Request) sockstest.Fault {
	if r.Cmd != sockstest.CmdConnect {
		return sockstest.Fault{}
	}
	return sockstest.Fault{Raw: []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}, End: sockstest.Hold}
}

func TestGrantsBeforeItDials(t *testing.T) {
	needWorld(t)
	r := examine(t, "--proxy", "socks5://"+proxyAt(t, grant).Addr().String())
	r.is(t, "errors", Warning, "grants a connection before it dials", "aria2", "dante")
	r.is(t, "names", NotTested)
	r.is(t, "IPv6", NotTested)
	r.onlyFaults(t)
}

func TestProxyOnThisHost(t *testing.T) {
	needWorld(t)
	s, err := sockstest.Listen("tcp4", "127.0.0.1:0", sockstest.WithResolve(resolve))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	url := "socks5://" + s.Addr().String()
	r := examine(t, "--proxy", url)
	r.is(t, "on this host", Warning, "runs on this host", "'viasocks run' works", "--exclude-uid")
	r.onlyFaults(t)
	r = examine(t, "--proxy", url, "--exclude-uid", "0")
	r.is(t, "on this host", OK, "lets the proxy's own connections pass")
	r = examine(t, "--proxy", "socks5://"+proxyAt(t, nil).Addr().String())
	for _, f := range r.Findings {
		if f.Check == "on this host" {
			t.Errorf("it is on another host: %+v", f)
		}
	}
}

func TestNoIPv6AtProxy(t *testing.T) {
	needWorld(t)
	for name, code := range map[string]byte{"address type": 8, "no route": 3} {
		t.Run(name, func(t *testing.T) {
			s := proxyAt(t, func(r sockstest.Request) sockstest.Fault {
				if r.Dst.IP.Is6() && !r.Dst.IP.Is4In6() && r.Cmd == sockstest.CmdConnect {
					return sockstest.Reply(code)
				}
				return sockstest.Fault{}
			})
			r := examine(t, "--proxy", "socks5://"+s.Addr().String())
			r.is(t, "IPv6", Warning, "IPv6", "--ipv6 off")
			r.onlyFaults(t)
		})
	}
}

func TestConflictingRule(t *testing.T) {
	needWorld(t)
	sh(t, "ip route add default via "+there4+" table 51820 && ip rule add not fwmark 0xca6c lookup 51820 pref 4000")
	t.Cleanup(func() { sh(t, "ip rule del pref 4000; ip route flush table 51820") })
	r := examine(t)
	r.is(t, "ip rules", Fault, "not fwmark 0xca6c", "lookup 51820", "takes all traffic", "--priority 3980")
	r.onlyFaults(t, "ip_rules")
	r = examine(t, "--priority", "3980")
	r.is(t, "ip rules", OK)
	sh(t, "ip rule add to 192.0.2.0/24 lookup 51820 pref 3000")
	r = examine(t, "--priority", "3980")
	sh(t, "ip rule del pref 3000")
	r.is(t, "ip rules", Warning, "to 192.0.2.0/24")
	sh(t, "ip rule add lookup 30323 pref 31000")
	r = examine(t, "--priority", "3980")
	sh(t, "ip rule del pref 31000")
	r.is(t, "ip rules", Fault, "Cannot use table 30323", "with --table", "will not start")
}

func TestMTUBlackHole(t *testing.T) {
	needWorld(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	s := proxyAt(t, nil)
	// A frame of several packets, which the kernel would cut for a real network, counts as a large packet.
	sh(t, "ip link set eth0 gso_max_segs 1")
	t.Cleanup(func() { sh(t, "ip link set eth0 gso_max_segs 65535") })
	const table = "ip netns exec proxy nft "
	sh(t, table+"'add table netdev hole; add chain netdev hole in { type filter hook ingress device eth0 priority 0; }; "+
		"add rule netdev hole in ip length > 1300 drop'")
	t.Cleanup(func() { exec.Command("sh", "-c", table+"delete table netdev hole").Run() })
	r := examine(t, "--proxy", "socks5://"+s.Addr().String())
	r.is(
		t,
		"packet size",
		Fault,
		"MTU black hole",
		"packets of 1260 bytes arrive",
		"those of 1500 do not",
		"tcp_mtu_probing=1",
		"dev eth0 mtu 1260",
	)
	r.is(t, "reached", OK)
	r.onlyFaults(t, "packet_size")
	sh(t, table+"delete table netdev hole")
	r = examine(t, "--proxy", "socks5://"+s.Addr().String())
	r.is(t, "packet size", OK)
}

// deaf is a port in the proxy's namespace that takes connections and says nothing.
func deaf(t *testing.T) string {
	t.Helper()
	got := make(chan net.Listener, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		fd, err := unix.Open(proxyNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		var ln net.Listener
		if err == nil {
			ln, err = net.Listen("tcp4", there4+":0")
		}
		if err != nil {
			t.Error(err)
		}
		got <- ln
	}()
	ln := <-got
	if ln == nil {
		t.FailNow()
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

func TestDeadDNS(t *testing.T) {
	needWorld(t)
	s := proxyAt(t, nil)
	at := deaf(t)
	r := examine(t, "--proxy", "socks5://"+s.Addr().String(), "--dns", "tcp://"+at)
	r.is(t, "DNS", Fault, "tcp://"+at, "did not answer within 5s", "--dns fake")
	r.onlyFaults(t, "DNS")
	r = examine(t, "--proxy", "socks5://"+s.Addr().String(), "--dns", "tcp://"+there4+":9")
	r.is(t, "DNS", Fault, "cannot be reached through the proxy", "refused")

	// The resolver of the proxy itself is dead: names hang.
	s = proxyAt(t, func(r sockstest.Request) sockstest.Fault {
		if r.Dst.Name != "" {
			return sockstest.Silence()
		}
		return sockstest.Fault{}
	})
	r = examine(t, "--proxy", "socks5://"+s.Addr().String())
	r.is(t, "names", Fault, "no answer within 6s", "resolver", "/etc/resolv.conf")
	r.onlyFaults(t, "names")
}

// Whatever hangs or lies, it ends in time and says something.
func TestHostileProxies(t *testing.T) {
	needWorld(t)
	for name, tt := range map[string]struct {
		stage sockstest.Stage
		fault sockstest.Fault
	}{
		"silent greeting": {sockstest.AtGreeting, sockstest.Silence()},
		"silent answers":  {sockstest.AtRequest, sockstest.Silence()},
		"drip":            {sockstest.AtRequest, sockstest.Drip(900 * time.Millisecond)},
		"garbage":         {sockstest.AtRequest, sockstest.Garbage()},
		"escapes":         {sockstest.AtRequest, sockstest.Fault{Raw: []byte("\x05\x1b[31m\x1b]0;x\x07")}},
		"long name":       {sockstest.AtRequest, sockstest.LongName()},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := proxyAt(t, nil)
			s.SetFaultAt(tt.stage, func(sockstest.Request) sockstest.Fault { return tt.fault })
			begun := time.Now()
			cmd := exec.Command(viasocks, "doctor", "--proxy", "socks5://"+s.Addr().String(), "--peer", there4+":7000", "--dns",
				"tcp://192.0.2.1")
			out, _ := cmd.CombinedOutput()
			if took := time.Since(begun); took > Limit+3*time.Second {
				t.Errorf("it took %v", took)
			}
			if len(out) < 500 || len(out) > 20_000 {
				t.Errorf("%d bytes:\n%s", len(out), out)
			}
			for _, b := range out {
				if b < ' ' && b != '\n' || b == 0x7f {
					t.Fatalf("a control character in\n%q", out)
				}
			}
		})
	}
}
