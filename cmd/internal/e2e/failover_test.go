package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// realServer is a SOCKS server in a process group of its own, or several programs that make one.
type realServer struct {
	t     *testing.T
	name  string
	port  int
	start []string // the program that listens
	cmd   *exec.Cmd
}

// up starts the server and waits until it listens.
func (s *realServer) up() {
	s.t.Helper()
	s.cmd = program(s.t, s.start...)
	listens(s.t, s.name, s.port)
}

// signal is for all processes of the server.
func (s *realServer) signal(sig syscall.Signal) { _ = syscall.Kill(-s.cmd.Process.Pid, sig) }

func (s *realServer) kill() {
	s.signal(syscall.SIGKILL)
	_ = s.cmd.Wait()
}

// program starts one in a process group of its own, which is killed with the test.
func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath(args[0])
	if err != nil {
		t.Skipf("%s is not installed: scripts/deps.sh test", args[0])
	}
	cmd := exec.Command(path, args[1:]...)
	log := &harness.Log{}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said: %s", args[0], harness.Tail(log.String(), 10))
		}
	})
	return cmd
}

// listens waits for a server. It does not connect: that would be a connection too many for the counts.
func listens(t *testing.T, name string, port int) {
	t.Helper()
	want := fmt.Sprintf(":%04X 00000000:0000 0A", port)
	testkit.EventuallyIn(t, testkit.Patience, name+" listens", func() bool {
		b, err := os.ReadFile("/proc/thread-self/net/tcp")
		return err == nil && strings.Contains(string(b), want)
	})
}

// attempt is one connection of the client.
type attempt struct {
	began time.Time
	took  time.Duration
	err   error
}

// client makes a connection every 100 ms, whatever became of those before.
type client struct {
	mu   sync.Mutex
	all  []attempt
	stop chan struct{}
	wg   sync.WaitGroup
}

const eachConnection = 100 * time.Millisecond

func startClient(a *app, dst netip.AddrPort) *client {
	c := &client{stop: make(chan struct{})}
	c.wg.Go(func() {
		tick := time.NewTicker(eachConnection)
		defer tick.Stop()
		for {
			select {
			case <-c.stop:
				return
			case <-tick.C:
			}
			c.wg.Go(func() {
				began := time.Now()
				fd, took, err := a.tryConnect(dst)
				if fd < 0 {
					return // the test is over
				}
				unix.Close(fd)
				c.mu.Lock()
				c.all = append(c.all, attempt{began, took, err})
				c.mu.Unlock()
			})
		}
	})
	return c
}

func (c *client) end() {
	close(c.stop)
	c.wg.Wait()
}

// since is what became of the connections that began after at.
func (c *client) since(at time.Time) (out []attempt) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range c.all {
		if x.began.After(at) {
			out = append(out, x)
		}
	}
	return out
}

// again is when a connection that began after at was made, after at; 0: none was.
func (c *client) again(at time.Time) (first time.Duration) {
	for _, x := range c.since(at) {
		if d := x.began.Add(x.took).Sub(at); x.err == nil && (first == 0 || d < first) {
			first = d
		}
	}
	return first
}

// figures sums up the connections since at.
func (c *client) figures(at time.Time) (n, failed int, slowest, usual time.Duration) {
	var slowAt time.Time
	for _, x := range c.since(at) {
		n++
		if x.err != nil {
			failed++
			continue
		}
		slowest = max(slowest, x.took)
		if x.took > 300*time.Millisecond && x.began.After(slowAt) {
			slowAt = x.began
		}
	}
	if !slowAt.IsZero() {
		usual = slowAt.Sub(at) + eachConnection // from here on connections are as quick as ever
	}
	return n, failed, slowest, usual
}

// fault is a way for a server to be away, and to be back.
type fault struct {
	name        string
	away, again func(*realServer)
}

var faults = []fault{
	{"refused", (*realServer).kill, (*realServer).up},
	{"silent", func(s *realServer) { s.signal(syscall.SIGSTOP) }, func(s *realServer) { s.signal(syscall.SIGCONT) }},
	{"cut off", func(s *realServer) { cut(s.t, "add", s.port) }, func(s *realServer) { cut(s.t, "delete", s.port) }},
}

// cut drops all packets to and from a port, of TCP and UDP.
func cut(t *testing.T, verb string, port int) {
	t.Helper()
	table := fmt.Sprintf("inet cut%d", port)
	script := verb + " table " + table + "\n"
	if verb == "add" {
		script += fmt.Sprintf(
			"add chain %s c { type filter hook input priority 0; }\nadd rule %[1]s c tcp dport %d drop\n"+
				"add rule %[1]s c tcp sport %[2]d drop\n",
			table,
			port,
		)
	}
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
}

// TestFailover has a client connect every 100 ms through a group of two real servers, while the first and then both are killed,
// stopped and cut off. The log has the figures.
func TestFailover(t *testing.T) {
	needWorld(t)
	if os.Geteuid() != 0 || testing.Short() {
		t.Skip("real servers need root, and a minute")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("nft is not installed: scripts/deps.sh test")
	}
	t.Parallel()
	dir := t.TempDir()
	t.Run("dante and microsocks", func(t *testing.T) {
		if !apart(t) {
			return
		}
		conf := filepath.Join(dir, "danted.conf")
		text := "logoutput: stderr\ninternal: 127.0.0.1 port = 1081\nexternal: " + other4 +
			"\nclientmethod: none\nsocksmethod: none\n" +
			"client pass { from: 0/0 to: 0/0 }\nsocks pass { from: 0/0 to: 0/0 log: error }\n"
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		testFailover(t, true,
			&realServer{name: "dante", port: 1081, start: []string{"danted", "-f", conf, "-p", filepath.Join(dir, "danted.pid")}},
			&realServer{name: "microsocks", port: 1082, start: []string{"microsocks", "-i", "127.0.0.1", "-p", "1082"}})
	})
	t.Run("ssh -D and ss-local", func(t *testing.T) {
		if !apart(t) {
			return
		}
		ssh := sshServer(t, dir, 1083)
		program(t, "ss-server", "-s", "127.0.0.1", "-p", "8388", "-k", "test", "-m", "aes-256-gcm")
		listens(t, "ss-server", 8388)
		testFailover(t, false, ssh, &realServer{name: "ss-local", port: 1084, start: []string{
			"ss-local", "-s", "127.0.0.1", "-p", "8388", "-k", "test", "-m", "aes-256-gcm", "-b", "127.0.0.1", "-l", "1084"}})
	})
}

// sshServer is ssh -D beside an sshd.
func sshServer(t *testing.T, dir string, port int) *realServer {
	t.Helper()
	key, host := filepath.Join(dir, "key"), filepath.Join(dir, "host_key")
	for _, k := range []string{key, host} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", k).CombinedOutput(); err != nil {
			t.Skipf("ssh-keygen: %v: %s", err, out)
		}
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		t.Fatal(err)
	}
	program(
		t,
		"/usr/sbin/sshd",
		"-D",
		"-e",
		"-f",
		"/dev/null",
		"-h",
		host,
		"-p",
		"2222",
		"-o",
		"ListenAddress=127.0.0.1",
		"-o",
		"UsePAM=no",
		"-o",
		"PidFile=none",
		"-o",
		"StrictModes=no",
		"-o",
		"AuthorizedKeysFile="+key+".pub",
		"-o",
		"PermitRootLogin=yes",
	)
	listens(t, "sshd", 2222)
	return &realServer{
		name: "ssh -D",
		port: port,
		start: []string{"ssh", "-F", "/dev/null", "-N", "-D", fmt.Sprintf("127.0.0.1:%d", port),
			"-p", "2222", "-i", key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
			"-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@127.0.0.1"},
	}
}

func testFailover(t *testing.T, udp bool, one, two *realServer) {
	one.t, two.t = t, t
	one.up()
	two.up()
	l, dst := listenTCP(t, world4)
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			c.Close()
		}
	}()
	group := fmt.Sprintf(
		"g=socks5://127.0.0.1:%d,socks5://127.0.0.1:%d connect-timeout=1s handshake-timeout=5s retry-after=2s",
		one.port,
		two.port,
	)
	a := startApp(t, "--upstream", group, "--rule", "via g", "--dns", "tcp://"+other4)
	c := startClient(a, dst)
	defer c.end()
	var e *echoes
	if udp {
		e = startEchoes(t, a)
		defer e.end()
	}
	testkit.Pace(time.Second)
	if !udp {
		refusedTargets(t, a)
	}
	for _, f := range faults {
		at := time.Now()
		f.away(one)
		testkit.Pace(3 * time.Second)
		n, failed, slowest, usual := c.figures(at)
		first := c.again(at)
		f.again(one)
		back := time.Now() // its start takes as long as the machine likes
		t.Logf(
			"%s %s: %d of %d connections failed; the first was made after %v, the slowest took %v, quick again after %v",
			one.name,
			f.name,
			failed,
			n,
			first.Round(time.Millisecond),
			slowest.Round(time.Millisecond),
			usual.Round(time.Millisecond),
		)
		if failed > 0 || first == 0 || first > 2500*time.Millisecond {
			t.Errorf("%s %s: a connection failed, or waited too long, although %s works", one.name, f.name, two.name)
		}
		testkit.EventuallyIn(t, testkit.Patience, one.name+" is used again", a.allUsed)
		t.Logf("%s is back and used again after %v", one.name, time.Since(back).Round(10*time.Millisecond))
		if udp {
			e.recovers(one.name+" "+f.name, back, 3*time.Second)
		}
	}
	for _, f := range faults {
		at := time.Now()
		f.away(one)
		f.away(two)
		testkit.Pace(3 * time.Second)
		n, failed, _, _ := c.figures(at)
		f.again(one)
		back := time.Now()
		testkit.EventuallyIn(t, testkit.Patience, "a connection is made again", func() bool { return c.again(back) > 0 })
		recovery := c.again(back)
		t.Logf(
			"both %s: %d of %d connections failed; %s came back, and the first was made %v later",
			f.name,
			failed,
			n,
			one.name,
			recovery.Round(time.Millisecond),
		)
		if recovery > 3*time.Second {
			t.Errorf("the group worked again %v after %s came back, more than 3s", recovery, one.name)
		}
		f.again(two)
		testkit.EventuallyIn(t, testkit.Patience, "both are used again", a.allUsed)
	}
}

// refusedTargets: ssh -D ends each request for a target that refuses. The program must see that, and the server stays in use: the
// other one grants before it dials, so that a connection would be made there.
func refusedTargets(t *testing.T, a *app) {
	for i := range 12 {
		testkit.Tries(t, "a target that refuses, through ssh -D", func() error {
			fd, _, err := a.connect(netip.AddrPortFrom(netip.MustParseAddr(world4), uint16(9+i)))
			unix.Close(fd)
			if !errors.Is(err, unix.ECONNREFUSED) {
				testkit.Eventually(t, "that it is used", a.allUsed)
				return fmt.Errorf("connect(): %v, want ECONNREFUSED", err)
			}
			return nil
		})
	}
	for line := range strings.Lines(a.log.String()) {
		// On a machine that stalls, ssh may not answer within the second of connect-timeout.
		fails := strings.Contains(line, "out of use") || strings.Contains(line, "does not work")
		if fails && !strings.Contains(line, "i/o timeout") {
			t.Errorf("ssh -D was taken for broken because targets refused: %s", line)
		}
	}
}

// allUsed reports whether all servers that were out of use are used again.
func (a *app) allUsed() bool {
	s := a.log.String()
	return strings.Count(s, "is used again") == strings.Count(s, "is out of use")
}

// echoes sends a datagram every 100 ms and notes when each answer came.
type echoes struct {
	t    *testing.T
	mu   sync.Mutex
	came []time.Time
	stop chan struct{}
	wg   sync.WaitGroup
}

func startEchoes(t *testing.T, a *app) *echoes {
	far, dst := farUDP(t, world4)
	go func() {
		b := make([]byte, 100)
		for n, from, err := far.ReadFromUDPAddrPort(b); err == nil; n, from, err = far.ReadFromUDPAddrPort(b) {
			_, _ = far.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	e := &echoes{t: t, stop: make(chan struct{})}
	app := a.udp(false)
	e.wg.Go(func() {
		tick := time.NewTicker(eachConnection)
		defer tick.Stop()
		for {
			select {
			case <-e.stop:
				app.SetReadDeadline(time.Unix(1, 0))
				return
			case <-tick.C:
				_, _ = app.WriteToUDPAddrPort([]byte("echo"), dst) // an ICMP error is not an end
			}
		}
	})
	e.wg.Go(func() {
		b := make([]byte, 100)
		for {
			_, _, err := app.ReadFromUDPAddrPort(b)
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				e.mu.Lock()
				e.came = append(e.came, time.Now())
				e.mu.Unlock()
			}
		}
	})
	return e
}

func (e *echoes) end() {
	close(e.stop)
	e.wg.Wait()
}

// recovers waits for the first echo after at, which must come within a time.
func (e *echoes) recovers(what string, at time.Time, within time.Duration) {
	e.t.Helper()
	var after time.Duration
	testkit.EventuallyIn(e.t, testkit.Patience, what+": an echo", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, x := range e.came {
			if x.After(at) {
				after = x.Sub(at)
				return true
			}
		}
		return false
	})
	e.t.Logf("%s: the first echo came %v after its return", what, after.Round(time.Millisecond))
	if after > within {
		e.t.Errorf("%s: that is more than %v", what, within)
	}
}
