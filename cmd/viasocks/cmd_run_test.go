package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

func server(t *testing.T, opts ...sockstest.Option) *sockstest.Server {
	t.Helper()
	s, err := sockstest.Listen("tcp4", "127.0.0.1:0", append(opts, sockstest.WithRedirectsOnly())...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// needNamespaces skips where `run` can't work, with its own reason.
func needNamespaces(t *testing.T, s *sockstest.Server) {
	t.Helper()
	if got := result(t, viasocks("run", "--proxy", s.URL(), "true")); !strings.HasPrefix(got, "exit 0\n") {
		t.Skip("viasocks run does not work here: " + got)
	}
}

// closedPort is a port of loopback where nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// What can be wrong with the proxy, and with the host, at the start.
func TestStartErrors(t *testing.T) {
	var all strings.Builder
	try := func(what string, cmd *exec.Cmd) {
		t.Helper()
		got := result(t, cmd)
		oneLine(t, got)
		if strings.Contains(got, "geheim") || !strings.HasPrefix(got, "exit 1\n") {
			t.Errorf("%s: shows the password, or another exit status than 1:\n%s", what, got)
		}
		all.WriteString("# " + what + "\n" + strings.Replace(got, "--- stdout\n--- stderr\n", "", 1) + "\n")
	}
	run := func(url string) *exec.Cmd { return viasocks("run", "--proxy", url, "true") }
	login := server(t, sockstest.WithAuth("al", "geheim"))
	withUser := func(s *sockstest.Server, user string) string {
		return "socks5://" + user + "@" + s.Addr().String()
	}
	misbehaves := func(f sockstest.Fault) *sockstest.Server {
		s := server(t)
		s.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return f })
		return s
	}
	try("nobody listens", run("socks5://al:geheim@"+closedPort(t)))
	try("a login is needed", run(login.URL()))
	try("wrong password", run(withUser(login, "al:geheim2")))
	try("not SOCKS", run(misbehaves(sockstest.Garbage()).URL()))
	try("closes", run(misbehaves(sockstest.EarlyClose()).URL()))
	try("resets", run(misbehaves(sockstest.EarlyReset()).URL()))
	golden(t, "start_errors.txt", all.String())

	all.Reset()
	if os.Getuid() != 0 {
		t.Skip("no root: the errors of a host without TUN and of a user without privilege are not tried")
	}
	open := server(t)
	noTUN := run(open.URL())
	noTUN.Args = append(
		[]string{"unshare", "-m", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$@"`, "sh", self(t)},
		noTUN.Args[1:]...)
	noTUN.Path = lookPath(t, "unshare")
	try("no /dev/net/tun", noTUN)
	plain := viasocks("up", "--proxy", open.URL())
	plain.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	try("up without privilege", plain)
	plain = viasocks("down")
	plain.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	try("down without privilege", plain)
	golden(t, "host_errors.txt", all.String())
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func lookPath(t *testing.T, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skip(err)
	}
	return p
}

// The password is not in the title while the proxy is greeted, and the program's own arguments stay as they are.
func TestTitle(t *testing.T) {
	s := server(t, sockstest.WithAuth("al", "geheim"))
	needNamespaces(t, server(t))
	cmd := viasocks("run", "--proxy", "socks5://al:geheim@"+s.Addr().String(), "sh", "-c", "echo up; read x", "http://u:mine@h")
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "up\n" {
		t.Fatalf("%q, %v", line, err)
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	if title := string(b); strings.Contains(title, "geheim") || !strings.Contains(title, "al:******@127") ||
		!strings.Contains(title, "u:mine@h") {
		t.Errorf("the title is %q", title)
	}
}

func TestRun(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	run := func(script string, more ...string) *exec.Cmd {
		cmd := viasocks(append(append([]string{"run", "--proxy", s.URL()}, more...), "--", "sh", "-c", script)...)
		cmd.Env = append(cmd.Env, "http_proxy=x", "FTP_PROXY=x", "VIASOCKS_X=x", "KEPT=1")
		return cmd
	}
	for _, tt := range []struct{ script, opt, want string }{
		{"exit 7", "", "exit 7\n--- stdout\n--- stderr\n"},
		{"kill -KILL $$", "", "exit 137\n"},
		{"echo $KEPT; env | grep -ic -e _proxy= -e ^viasocks", "", "exit 1\n--- stdout\n1\n0\n"},
		{"env | grep -ic -e _proxy= -e ^viasocks", "--keep-proxy-env", "exit 0\n--- stdout\n2\n"},
		{"cat /etc/resolv.conf", "", "exit 0\n--- stdout\nnameserver 198.18.0.2\n"},
		{"ulimit -Sn", "", "exit 0\n--- stdout\n" + limit(t)},
		{"grep -e SigIgn /proc/self/status", "", "exit 0\n--- stdout\n" + ignored(t)},
	} {
		var more []string
		if tt.opt != "" {
			more = []string{tt.opt}
		}
		if got := result(t, run(tt.script, more...)); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: got\n%swant\n%s", tt.script, got, tt.want)
		}
	}
	for prog, want := range map[string]string{
		"/does/not/exist": "exit 127\n--- stdout\n--- stderr\nviasocks: cannot run /does/not/exist: no such file or directory\n",
		"/etc/passwd":     "exit 126\n--- stdout\n--- stderr\nviasocks: cannot run /etc/passwd: permission denied\n",
	} {
		if got := result(t, viasocks("run", "--proxy", s.URL(), prog)); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
	}
}

// What our caller ignores, as nohup and a shell's background jobs do, is ignored by us and by the program.
func TestRunIgnores(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	var own uint64 // what this process was started to ignore is none of ours
	if _, err := fmt.Sscanf(ignored(t), "SigIgn:\t%x", &own); err != nil {
		t.Fatal(err)
	}
	for name, sig := range map[string]syscall.Signal{"HUP": syscall.SIGHUP, "INT": syscall.SIGINT} {
		cmd := viasocks(
			"run",
			"--proxy",
			s.URL(),
			"sh",
			"-c",
			"grep SigIgn /proc/self/status; kill -"+name+" $PPID $$; sleep 0.2; echo lives",
		)
		cmd.Args = append([]string{"sh", "-c", "trap '' " + name + "; exec \"$@\"", "sh", self(t)}, cmd.Args[1:]...)
		cmd.Path = lookPath(t, "sh")
		got := result(t, cmd)
		want := fmt.Sprintf("exit 0\n--- stdout\nSigIgn:\t%016x\nlives\n", own|1<<(sig-1))
		if !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// limit is the soft limit of open files that a program started by us has.
func limit(t *testing.T) string {
	t.Helper()
	b, err := exec.Command("sh", "-c", "ulimit -Sn").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TERM is the program's to answer, INT from the terminal is not ours.
func TestRunSignals(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1} {
		if signal.Ignored(sig) {
			continue // whoever runs the test has ignored it, and so will they
		}
		cmd := viasocks(
			"run",
			"--proxy",
			s.URL(),
			"sh",
			"-c",
			"trap 'exit 9' TERM HUP USR1; echo up; while :; do sleep 0.05; done",
		)
		out, _ := cmd.StdoutPipe()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		cmd.Process.Signal(syscall.SIGINT)
		testkit.Pace(50 * time.Millisecond) // two signals that come at once may be taken in either order
		cmd.Process.Signal(sig)
		cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 9 {
			t.Errorf("%s: exit %d", sig, code)
		}
	}
}

// The whole way: what the program says reaches the far end by the proxy.
func TestRunCarries(t *testing.T) {
	bash := lookPath(t, "bash")
	far, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	go func() {
		for {
			c, err := far.Accept()
			if err != nil {
				return
			}
			c.Write([]byte("hello from afar\n"))
			c.Close()
		}
	}()
	s := server(t, sockstest.WithDial(func(ctx context.Context, dst sockstest.Addr) (net.Conn, error) {
		if dst.String() != "203.0.113.9:80" {
			return nil, errors.New("not that one")
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", far.Addr().String())
	}))
	needNamespaces(t, s)
	got := result(t, viasocks("run", "--proxy", s.URL(), "--log-level", "info", bash, "-c", "cat < /dev/tcp/203.0.113.9/80"))
	if !strings.HasPrefix(got, "exit 0\n--- stdout\nhello from afar\n") || !strings.Contains(got, "dst=203.0.113.9:80") {
		t.Error(got)
	}
	if r := s.Requests(); len(r) == 0 || r[len(r)-1].Dst.String() != netip.MustParseAddrPort("203.0.113.9:80").String() {
		t.Errorf("requests: %v", r)
	}
}

// A signal while the proxy does not answer ends it at once, and says so.
func TestStoppedEarly(t *testing.T) {
	s := server(t)
	s.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	cmd := viasocks("run", "--proxy", s.URL(), "true")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	testkit.Until(testkit.Patience, func() bool { return s.Stats().Accepted != 0 })
	sig := syscall.SIGINT
	if signal.Ignored(sig) {
		sig = syscall.SIGTERM
	}
	cmd.Process.Signal(sig)
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 1 || stderr.String() != "viasocks: stopped by a signal: "+sig.String()+"\n" {
		t.Errorf("exit %d: %s", code, &stderr)
	}
}

// ignored is the line of /proc/self/status with the signals that this process was started to ignore: viasocks must not
// add to them for the program.
func ignored(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "SigIgn:") {
			return line
		}
	}
	t.Fatal("no SigIgn in /proc/self/status")
	return ""
}
