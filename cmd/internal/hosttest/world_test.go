package hosttest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

const (
	hostLAN4, lanRouter4 = "10.77.0.2", "10.77.0.1" // private, on-link
	hostLAN6, lanRouter6 = "fd77::2", "fd77::1"
	host4, router4       = "198.51.100.2", "198.51.100.1" // public; the default route
	host6, router6       = "2001:db8:1::2", "2001:db8:1::1"
	proxy4, proxy6       = "192.0.2.2", "2001:db8:2::2"
	proxyB4              = "192.0.2.3" // another proxy
	ctr4, ctr6           = "172.20.0.2", "fd00:20::2"
	client4, client6     = "203.0.113.200", "2001:db8:f::200" // in world: who connects to the host
	routerMAC            = "02:00:00:00:77:01"
	routerLL             = "fe80::ff:fe00:7701" // RFC 4291 appendix A, of this MAC address
)

// The ports that the proxy's kernel gives to its relays.
const relayPortMin, relayPortMax = 40000, 59999

func relayPort(n uint16) bool { return n >= relayPortMin && n <= relayPortMax }

// world is the topology in doc.go.
type world struct {
	t        testing.TB
	programs []*program // by start
}

// topology is made by one `ip -batch` for each namespace.
var topology = []struct{ ns, batch string }{
	{"router", `
link set lo up
link add host0 address ` + routerMAC + ` type veth peer name eth0 netns host
link add proxy0 type veth peer name eth0 netns proxy
link add world0 type veth peer name eth0 netns world
link set host0 up
link set proxy0 up
link set world0 up
addr add ` + lanRouter4 + `/24 dev host0
addr add ` + router4 + `/24 dev host0
addr add ` + router6 + `/64 dev host0 nodad
addr add ` + lanRouter6 + `/64 dev host0 nodad
addr add 192.0.2.1/24 dev proxy0
addr add 2001:db8:2::1/64 dev proxy0 nodad
addr add 10.99.0.1/30 dev world0
addr add 2001:db8:9::1/64 dev world0 nodad
`},
	{"host", `
link set lo up
link set eth0 up
addr add ` + hostLAN4 + `/24 dev eth0
addr add ` + host4 + `/24 dev eth0
addr add ` + host6 + `/64 dev eth0 nodad
addr add ` + hostLAN6 + `/64 dev eth0 nodad
route add default via ` + router4 + ` dev eth0
-6 route add default via ` + router6 + ` dev eth0
link add br0 type bridge
link set br0 up
addr add 172.20.0.1/24 dev br0
addr add fd00:20::1/64 dev br0 nodad
link add ctr0 type veth peer name eth0 netns ctr
link set ctr0 master br0
link set ctr0 up
`},
	{"ctr", `
link set lo up
link set eth0 up
addr add ` + ctr4 + `/24 dev eth0
addr add ` + ctr6 + `/64 dev eth0 nodad
route add default via 172.20.0.1
-6 route add default via fd00:20::1
`},
	{"proxy", `
link set lo up
link set eth0 up
addr add ` + proxy4 + `/24 dev eth0
addr add ` + proxyB4 + `/24 dev eth0
addr add ` + proxy6 + `/64 dev eth0 nodad
route add default via 192.0.2.1
-6 route add default via 2001:db8:2::1
`},
	{"world", `
link set lo up
link set eth0 up
addr add 10.99.0.2/30 dev eth0
addr add 2001:db8:9::2/64 dev eth0 nodad
route add default via 10.99.0.1
-6 route add default via 2001:db8:9::1
addr add ` + client4 + `/32 dev lo
addr add ` + client6 + `/128 dev lo nodad
addr add 2001:db8:f::5/128 dev lo nodad
route add local 203.0.113.0/24 dev lo
-6 route add local 2001:db8:f::/64 dev lo
`},
	{"router", `
route add 203.0.113.0/24 via 10.99.0.2
-6 route add 2001:db8:f::/64 via 2001:db8:9::2
`},
}

// dockerRules are what docker does for a bridge, and what keeps a container behind it on the net.
const dockerRules = `
table ip nat {
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local counter jump DOCKER
	}
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 172.20.0.0/24 oifname != "br0" counter masquerade
	}
	chain DOCKER {
		iifname != "br0" tcp dport 8080 counter dnat to ` + ctr4 + `:80
	}
}
table ip6 nat {
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		iifname != "br0" ip6 daddr ` + host6 + ` tcp dport 8080 counter dnat to [` + ctr6 + `]:80
	}
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		ip6 saddr fd00:20::/64 oifname != "br0" counter masquerade
	}
}
`

// newWorld makes the topology; it goes with the test.
func newWorld(t testing.TB) *world {
	t.Helper()
	if why := os.Getenv(envWhy); why != "" {
		t.Skip(why)
	}
	if testing.Short() {
		t.Skip("namespaces and the whole life of a daemon are not short")
	}
	w := &world{t: t}
	for _, ns := range []string{"router", "host", "ctr", "proxy", "world"} {
		w.run("", nil, "ip", "netns", "add", ns)
		t.Cleanup(func() { w.run("", nil, "ip", "netns", "del", ns) })
		w.sysctl(ns, map[string]string{
			"net/ipv6/conf/all/accept_dad": "0", "net/ipv6/conf/default/accept_dad": "0",
			"net/ipv6/conf/all/accept_ra": "0", "net/ipv6/conf/default/accept_ra": "0",
		})
	}
	for _, s := range topology {
		w.ip(s.ns, s.batch)
	}
	for _, ns := range []string{"router", "host"} {
		w.sysctl(ns, map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
	}
	w.sysctl("proxy", map[string]string{"net/ipv4/ip_local_port_range": fmt.Sprintf("%d %d", relayPortMin, relayPortMax)})
	w.sysctl("host", map[string]string{"net/ipv4/ping_group_range": "0 0"}) // group 0 may use ping sockets: the tests are of it
	w.nft("host", dockerRules)
	w.settle()
	return w
}

// settle waits until the kernel has said of the host's links that they carry: it does so from a work queue, up to a second
// after they came up.
func (w *world) settle() {
	w.t.Helper()
	w.eventually(30*time.Second, "the links carry", func() bool {
		six, addrs := w.ip("host", "-6 route show table all"), w.ip("host", "addr show up")
		s := w.ip("host", "-4 route show table all") + six + addrs
		return !regexp.MustCompile(`linkdown|tentative|NO-CARRIER|LOWERLAYERDOWN|state DOWN`).MatchString(s) &&
			testkit.HasLocalRoutes(addrs, six) &&
			testkit.HasLocalRoutes(w.ip("ctr", "addr show up"), w.ip("ctr", "-6 route show table all"))
	})
}

// in runs f on a thread in a network namespace. The thread ends with it.
func in(ns string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			if err := setns(ns); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-done
}

func setns(ns string) error {
	fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open the namespace %s: %w", ns, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("cannot enter the namespace %s: %w", ns, err)
	}
	return nil
}

func (w *world) in(ns string, f func() error) {
	w.t.Helper()
	if err := in(ns, f); err != nil {
		w.t.Fatal(err)
	}
}

// try runs a command in a namespace ("" is the test's own) and gives its output.
func try(ns string, stdin []byte, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	var out []byte
	run := func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	}
	var err error
	if ns == "" {
		err = run()
	} else {
		err = in(ns, run)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func (w *world) run(ns string, stdin []byte, args ...string) string {
	w.t.Helper()
	out, err := try(ns, stdin, args...)
	if err != nil {
		w.t.Fatalf("in %s: %v", ns, err)
	}
	return out
}

// ip runs lines of ip(8) in a namespace.
func (w *world) ip(ns, batch string) string {
	w.t.Helper()
	var out strings.Builder
	for line := range strings.Lines(batch) {
		// -batch does not take -6 within a line.
		if f := strings.Fields(line); len(f) > 0 {
			out.WriteString(w.run("", nil, append([]string{"ip", "-n", ns}, f...)...))
		}
	}
	return out.String()
}

func (w *world) nft(ns, script string) string {
	w.t.Helper()
	return w.run(ns, []byte(script), "nft", "-f", "-")
}

func (w *world) sysctl(ns string, set map[string]string) {
	w.t.Helper()
	w.in(ns, func() error {
		for k, v := range set {
			if err := os.WriteFile("/proc/sys/"+k, []byte(v), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}

// No connection of the tests has keepalive, which Go would send after 15 s: it came in whatever phase there was then, and
// was no probe's.

// listen opens a TCP listener in a namespace, dual-stack when addr is a port alone.
func (w *world) listen(ns, addr string) net.Listener {
	w.t.Helper()
	var l net.Listener
	w.in(ns, func() (err error) {
		l, err = (&net.ListenConfig{KeepAlive: -1}).Listen(context.Background(), "tcp", addr)
		return err
	})
	w.t.Cleanup(func() { l.Close() })
	return l
}

// serve answers each connection of l with f, which need not close it. The connections that are open when l is closed end
// with it: the other end may have vanished without a word.
func serve(l net.Listener, f func(net.Conn)) {
	go func() {
		var mu sync.Mutex
		open := map[net.Conn]bool{}
		for {
			c, err := l.Accept()
			mu.Lock()
			if err != nil {
				for c := range open {
					c.Close()
				}
				mu.Unlock()
				return
			}
			open[c] = true
			mu.Unlock()
			go func() {
				f(c)
				c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			}()
		}
	}()
}

// dial connects from a namespace; the connection is closed with the test.
func (w *world) dial(ns string, to netip.AddrPort) (c net.Conn, err error) {
	err = in(ns, func() (err error) {
		c, err = (&net.Dialer{Timeout: 20 * time.Second, KeepAlive: -1}).Dial("tcp", to.String())
		return err
	})
	if err == nil {
		w.t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// packets opens a UDP socket in a namespace.
func (w *world) packets(ns, addr string) *net.UDPConn {
	w.t.Helper()
	var c net.PacketConn
	w.in(ns, func() (err error) {
		c, err = net.ListenPacket("udp", addr)
		return err
	})
	w.t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func netipAddrPort(a string, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr(a), port) }
