package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// listenSOCKS starts a proxy on loopback.
func listenSOCKS(t testing.TB, opts ...sockstest.Option) *sockstest.Server {
	t.Helper()
	needWorld(t)
	s, err := sockstest.Listen("tcp", "127.0.0.1:0", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// listenTCP listens in the world.
func listenTCP(t testing.TB, host string) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	needWorld(t)
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener), l.Addr().(*net.TCPAddr).AddrPort()
}

const (
	firstPort    = 6000
	rejectedPort = 7001
	droppedPort  = 7002
	silentPort   = 7003
)

type outcome struct {
	what   string
	port   uint16
	fault  sockstest.Fault
	v4, v6 error
	slow   bool // the app's own timer: tcp_syn_retries=1, 3 s
}

func outcomes() []outcome {
	rows := []outcome{
		{what: "reply 1 general failure", fault: sockstest.Reply(1), v4: unix.ECONNREFUSED, v6: unix.ECONNREFUSED},
		{what: "reply 2 not allowed", fault: sockstest.Reply(2), v4: unix.EHOSTUNREACH, v6: unix.EACCES},
		{what: "reply 3 network unreachable", fault: sockstest.Reply(3), v4: unix.ENETUNREACH, v6: unix.ENETUNREACH},
		{what: "reply 4 host unreachable", fault: sockstest.Reply(4), v4: unix.EHOSTUNREACH, v6: unix.EHOSTUNREACH},
		{what: "reply 5 connection refused", fault: sockstest.Reply(5), v4: unix.ECONNREFUSED, v6: unix.ECONNREFUSED},
		{what: "reply 6 TTL expired", fault: sockstest.Reply(6), v4: unix.EHOSTUNREACH, v6: unix.EHOSTUNREACH},
		{what: "reply 7 command not supported", fault: sockstest.Reply(7), v4: unix.ENETUNREACH, v6: unix.ENETUNREACH},
		{what: "reply 8 address type not supported", fault: sockstest.Reply(8), v4: unix.ENETUNREACH, v6: unix.ENETUNREACH},
		{what: "reply 9 unassigned", fault: sockstest.Reply(9), v4: unix.ECONNREFUSED, v6: unix.ECONNREFUSED},
		{what: "reply 255 unassigned", fault: sockstest.Reply(255), v4: unix.ECONNREFUSED, v6: unix.ECONNREFUSED},
		{what: "verdict reject", port: rejectedPort, v4: unix.ECONNREFUSED, v6: unix.ECONNREFUSED},
		{what: "verdict drop", port: droppedPort, v4: unix.ETIMEDOUT, v6: unix.ETIMEDOUT, slow: true},
		{what: "no reply", port: silentPort, fault: sockstest.Silence(), v4: unix.ETIMEDOUT, v6: unix.ETIMEDOUT, slow: true},
	}
	for i := range rows {
		if rows[i].port == 0 {
			rows[i].port = firstPort + uint16(i)
		}
	}
	return rows
}

// TestOutcomes is the outcome table: what the proxy says, and the errno that a blocking connect() gives the program.
func TestOutcomes(t *testing.T) { eachApart(t, testOutcomes) }

func testOutcomes(t *testing.T, offload string) {
	rows := outcomes()
	proxy := listenSOCKS(t)
	proxy.SetFault(func(r sockstest.Request) sockstest.Fault {
		for _, row := range rows {
			if row.port == r.Dst.Port {
				return row.fault
			}
		}
		return sockstest.Fault{}
	})
	// The rows in which the app's own timer decides are shortened: 3 s instead of 130.
	retries := envRetries + "=1"
	a := startAppWith(t, retries, "--proxy", proxy.URL(), "--offload", offload,
		"--rule", fmt.Sprintf("port %d reject", rejectedPort), "--rule", fmt.Sprintf("port %d drop", droppedPort), "--rule",
		"via proxy")
	hasty := startAppWith(t, retries, "--proxy", proxy.URL(), "--offload", offload, "--handshake-timeout", "1s")

	var slow sync.WaitGroup
	defer slow.Wait()
	for _, host := range []string{world4, world6} {
		addr := netip.MustParseAddr(host)
		ipv := map[bool]string{true: "IPv4", false: "IPv6"}[addr.Is4()]
		t.Run("granted/"+ipv, func(t *testing.T) { testGranted(t, a, host) })
		t.Run("nobody listens/"+ipv, func(t *testing.T) { // a true refusal, no fault of the proxy's making
			fd, took, err := a.connect(netip.AddrPortFrom(addr, 9))
			unix.Close(fd)
			if err != unix.ECONNREFUSED {
				t.Fatalf("connect: %v, want ECONNREFUSED", err)
			}
			t.Logf("closed port: ECONNREFUSED in %v", took.Round(100*time.Microsecond))
		})
		for _, row := range rows {
			by := a
			if row.port == silentPort {
				by = hasty
			}
			check := func(t *testing.T) { row.check(t, by, proxy, addr, ipv) }
			if row.slow { // all of them at once
				slow.Go(func() { check(t) })
				continue
			}
			t.Run(row.what+"/"+ipv, check)
		}
	}
}

func testGranted(t *testing.T, a *app, host string) {
	l, dst := listenTCP(t, host)
	fd, took, err := a.connect(dst)
	unix.Close(fd)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	l.SetDeadline(time.Now().Add(testkit.Patience))
	c, err := l.Accept()
	if err != nil {
		t.Fatal("granted, but nobody came to the far end")
	}
	c.Close()
	t.Logf("granted: connect() = 0 in %v", took.Round(100*time.Microsecond))
}

// check tries the row until a try goes well.
func (row outcome) check(t *testing.T, by *app, proxy *sockstest.Server, addr netip.Addr, ipv string) {
	testkit.Tries(t, row.what+", "+ipv, func() error { return row.try(t, by, proxy, addr, ipv) })
}

func (row outcome) try(t *testing.T, by *app, proxy *sockstest.Server, addr netip.Addr, ipv string) error {
	want := row.v4
	if addr.Is6() {
		want = row.v6
	}
	dst := netip.AddrPortFrom(addr, row.port)
	asked := func() (n int) {
		for _, r := range proxy.Requests() {
			if r.Dst.Port == dst.Port() && r.Dst.IP == dst.Addr() {
				n++
			}
		}
		return n
	}
	before := asked()
	fd, took, err := by.tryConnect(dst)
	unix.Close(fd)
	if !errors.Is(err, want) {
		return fmt.Errorf("connect(): %v after %v, want %v", err, took, want)
	}
	if !row.slow && took > 900*time.Millisecond {
		return fmt.Errorf("the error came after %v: not before the first retransmission", took)
	}
	if row.slow && took < 2*time.Second {
		return fmt.Errorf("the error came after %v: not by the app's own timer", took)
	}
	questions := 1
	if row.port == rejectedPort || row.port == droppedPort {
		questions = 0
	}
	if n := asked() - before; n != questions {
		return fmt.Errorf("the proxy was asked %d times, want %d", n, questions)
	}
	t.Logf("%s, %s: connect() = %s in %v", row.what, ipv, unix.ErrnoName(err.(syscall.Errno)), took.Round(100*time.Microsecond))
	return nil
}

// TestImpossible: what no proxy can carry is refused at once, by TCP and by UDP, and the proxy is not asked: addresses that
// nobody can have, and fake ones that stand for no name.
func TestImpossible(t *testing.T) { eachApart(t, testImpossible) }

func testImpossible(t *testing.T, offload string) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
	for at, want := range map[string]error{
		"0.1.2.3:80":                   unix.ENETUNREACH,
		"240.0.0.1:80":                 unix.ENETUNREACH,
		"254.1.2.3:80":                 unix.ENETUNREACH,
		"169.254.169.254:80":           unix.ENETUNREACH,
		"198.19.1.1:80":                unix.EHOSTUNREACH,
		"[fd76:6961:736f:636b::77]:80": unix.EHOSTUNREACH,
	} {
		dst := netip.MustParseAddrPort(at)
		testkit.Tries(t, "TCP to "+at, func() error {
			fd, took, err := a.connect(dst)
			unix.Close(fd)
			if err != want || took > 900*time.Millisecond {
				return fmt.Errorf("%v after %v, want %w at once", err, took, want)
			}
			return nil
		})
		u := a.socket(family(dst), unix.SOCK_DGRAM)
		defer unix.Close(u)
		// Without it the kernel does not tell a UDP socket that a network is unreachable.
		level, option := unix.IPPROTO_IP, unix.IP_RECVERR
		if dst.Addr().Is6() {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
		}
		if err := unix.SetsockoptInt(u, level, option, 1); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(u, sockaddr(dst)); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(u, []byte("x")); err != nil {
			t.Fatal(err)
		}
		p := []unix.PollFd{{Fd: int32(u), Events: unix.POLLIN}}
		for n := 0; n == 0; {
			var err error
			if n, err = unix.Poll(p, int(testkit.Patience/time.Millisecond)); n == 0 || err != nil && err != unix.EINTR {
				t.Fatalf("UDP to %v: no error came (%v)", dst, err)
			}
		}
		if _, err := unix.Read(u, make([]byte, 1)); err != want {
			t.Errorf("UDP to %v: %v, want %v", dst, err, want)
		}
	}
	if n := len(proxy.Requests()); n != 0 {
		t.Errorf("the proxy was asked %d times", n)
	}
}

// TestNoDescriptors: viasocks has run out of descriptors. A program waits, and is connected when there are some again; it is
// not told that the network is unreachable.
func TestNoDescriptors(t *testing.T) {
	if !apart(t) {
		return
	}
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL())
	l, dst := listenTCP(t, world4)
	far, _ := farUDP(t, world4)
	a.tcp(dst)
	pid := a.cmd.Process.Pid
	var was unix.Rlimit
	limit := unix.Rlimit{Cur: 3}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		t.Fatal(err)
	}
	limit.Max = was.Max
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	u := a.udp(false)
	send(t, u, far.LocalAddr().(*net.UDPAddr).AddrPort(), "later")
	ended := make(chan error, 1)
	go func() {
		fd, _, err := a.tryConnect(dst)
		unix.Close(fd)
		ended <- err
	}()
	testkit.EventuallyIn(t, testkit.Patience, "it is said", func() bool { return strings.Contains(a.log.String(), "run out") })
	select {
	case err := <-ended:
		t.Fatalf("connect() ended with %v while there was no descriptor", err)
	case <-time.After(1500 * time.Millisecond): // the SYN came again
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &was, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("connect(): %v", err)
	}
	if got, _ := recv(t, far); got != "later" {
		t.Errorf("the datagram that waited: %q", got)
	}
	if n := strings.Count(a.log.String(), "run out"); n != 1 {
		t.Errorf("it is said %d times", n)
	}
	l.Close()
}

// TestProxyGone: the proxy dies while viasocks runs; programs get an error at once, and it works again when it is back.
func TestProxyGone(t *testing.T) { eachApart(t, testProxyGone) }

func testProxyGone(t *testing.T, offload string) {
	proxy := listenSOCKS(t)
	addr := proxy.Addr()
	a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
	for _, host := range []string{world4, world6} {
		l, dst := listenTCP(t, host)
		a.tcp(dst)
		if err := proxy.Close(); err != nil {
			t.Fatal(err)
		}
		fd, took, err := a.connect(dst)
		unix.Close(fd)
		if err != unix.ENETUNREACH {
			t.Errorf("%s: connect() without a proxy: %v after %v, want ENETUNREACH", host, err, took)
		}
		if proxy, err = sockstest.Listen("tcp", addr.String()); err != nil {
			t.Fatal(err)
		}
		defer proxy.Close()
		a.tcp(dst)
		l.Close()
	}
}

// TestNoRule: a flow that no rule matches is refused, never sent direct.
func TestNoRule(t *testing.T) {
	if !apart(t) {
		return
	}
	proxy := listenSOCKS(t)
	l, dst := listenTCP(t, world4)
	a := startApp(t, "--upstream", "p="+proxy.URL(), "--rule", "port 1 via p")
	fd, _, err := a.connect(dst)
	unix.Close(fd)
	if err == nil {
		t.Error("a flow that no rule matches was connected")
	}
	l.SetDeadline(time.Now().Add(100 * time.Millisecond))
	if c, err := l.Accept(); err == nil {
		c.Close()
		t.Error("a flow that no rule matches reached the far end")
	}
}

// TestDialPendingProgramGone: a program gives up while the proxy has not answered: the dial is cancelled.
func TestDialPendingProgramGone(t *testing.T) {
	proxy := listenSOCKS(t)
	proxy.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	a := startApp(t, "--proxy", proxy.URL(), "--handshake-timeout", "60s")
	ctx, cancel := context.WithTimeout(context.Background(), 2*testkit.Patience)
	defer cancel()
	for _, host := range []string{world4, world6} {
		dst := netip.AddrPortFrom(netip.MustParseAddr(host), 7)
		before := proxy.Stats().Open
		fd := a.socket(family(dst), unix.SOCK_STREAM)
		if err := unix.SetNonblock(fd, true); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, sockaddr(dst)); err != unix.EINPROGRESS {
			t.Fatalf("connect: %v", err)
		}
		testkit.EventuallyIn(t, testkit.Patience, "the proxy is asked", func() bool { return proxy.Stats().Open > before })
		start := time.Now()
		unix.Close(fd) // Linux sends nothing in SYN_SENT
		for proxy.Stats().Open > before {
			select {
			case <-ctx.Done():
				t.Fatalf("%s: the dial of a program that is gone is still pending after %v", host, time.Since(start))
			case <-time.After(20 * time.Millisecond):
			}
		}
		t.Logf("%s: cancelled %v after the socket was closed", host, time.Since(start).Round(time.Millisecond))
		if d := time.Since(start); d > 15*time.Second { // 5 s, unless the machine stalls
			t.Errorf("%s: cancelled only after %v", host, d)
		}
	}
}
