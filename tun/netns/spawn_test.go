package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// testSpec is a Spec that runs argv with output to a pipe.
func testSpec(argv ...string) Spec {
	return Spec{
		Argv:       argv,
		TUN:        TUNOptions{Name: "tun0", MTU: 1500, VnetHdr: true},
		Addrs:      []netip.Prefix{netip.MustParsePrefix("10.77.0.1/32"), netip.MustParsePrefix("fd00:77::1/128")},
		Nameserver: []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8::53")},
	}
}

// spawn starts the program's helper, or skips.
func spawn(t testing.TB, s Spec) *Child {
	t.Helper()
	if noNamespace != "" {
		t.Skip(noNamespace)
	}
	c, err := Spawn(t.Context(), s)
	if err != nil && (strings.Contains(err.Error(), tunNode) || strings.Contains(err.Error(), "user namespace")) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	return c
}

// run runs the program to its end.
func run(t testing.TB, s Spec) (out string, exit int, err error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	s.Stdout = w
	if s.Stderr == nil {
		s.Stderr = w
	}
	c := spawn(t, s)
	defer c.Close()
	w.Close()
	got := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		got <- string(b)
	}()
	if err := c.Exec(); err != nil {
		t.Fatal(err)
	}
	exit, err = c.Wait()
	return <-got, exit, err
}

func TestSpawnArguments(t *testing.T) {
	odd := []string{"", "two words", "a\nline", "\xff\xfe", "$HOME", "--", "ünïcode"}
	s := testSpec(append([]string{"printf", `<%s>`}, odd...)...)
	out, exit, err := run(t, s)
	if want := "<" + strings.Join(odd, "><") + ">"; out != want || exit != 0 || err != nil {
		t.Errorf("%q, %d, %v; want %q", out, exit, err, want)
	}
	s = testSpec("env")
	s.Env = []string{"PATH=/usr/bin:/bin", "B=2", "A=a b", "A=twice", "EMPTY=", "ODD=\xff"}
	out, exit, err = run(t, s)
	if want := strings.Join(s.Env, "\n") + "\n"; out != want || exit != 0 || err != nil {
		t.Errorf("%q, %d, %v; want %q", out, exit, err, want)
	}
	s = testSpec("pwd")
	s.Dir = "/usr"
	if out, exit, err = run(t, s); out != "/usr\n" || exit != 0 || err != nil {
		t.Errorf("%q, %d, %v", out, exit, err)
	}
	s = testSpec("cat")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s.Stdin = r
	go func() {
		w.WriteString("through the pipe")
		w.Close()
	}()
	if out, exit, err = run(t, s); out != "through the pipe" || exit != 0 || err != nil {
		t.Errorf("%q, %d, %v", out, exit, err)
	}
}

func TestSpawnExit(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	file := func(name, content string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		os.Chmod(p, mode)
		return p
	}
	file("plain", "echo $1 $#; exit 3\n", 0o755)
	for _, c := range []struct {
		name string
		argv []string
		exit int
		out  string
		err  string
	}{
		{"true", []string{"true"}, 0, "", ""},
		{"status", []string{"sh", "-c", "exit 7"}, 7, "", ""},
		{"signal", []string{"sh", "-c", "kill -9 $$"}, 137, "", ""},
		{"not found", []string{"viasocks-no-such-program"}, 127, "", "cannot run viasocks-no-such-program: not found in PATH"},
		{"no such file", []string{"./no-such-file"}, 127, "", "cannot run ./no-such-file: no such file or directory"},
		{"not executable", []string{file("text", "x", 0o644)}, 126, "", "permission denied"},
		{"directory", []string{dir}, 126, "", "is a directory"},
		{"no interpreter", []string{file("lost", "#!/no/such/sh\n", 0o755)}, 126, "", "interpreter"},
		{"script without a first line", []string{"plain", "a b", "c"}, 3, "a b 2\n", ""},
		{"too long", []string{"true", strings.Repeat("x", 300000)}, 126, "", "argument list too long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fds := testkit.CountFiles(t)
			s := testSpec(c.argv...)
			s.Env = []string{"PATH=/no/such:/etc/passwd:" + dir + ":/usr/bin:/bin"}
			out, exit, err := run(t, s)
			if exit != c.exit || out != c.out {
				t.Errorf("exit %d with %q; want %d with %q", exit, out, c.exit, c.out)
			}
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %q, want %q", err, c.err)
			}
			if n := testkit.CountFiles(t); n != fds {
				t.Errorf("%d open files, %d before", n, fds)
			}
		})
	}
	s := testSpec("true")
	s.Dir = "/no/such/dir"
	if _, exit, err := run(t, s); exit != 126 || err == nil || !strings.Contains(err.Error(), "/no/such/dir") {
		t.Errorf("%d, %v", exit, err)
	}
	if _, err := Spawn(t.Context(), Spec{}); err == nil {
		t.Error("nothing can be run")
	}
}

// TestSpawnWorld looks around inside.
func TestSpawnWorld(t *testing.T) {
	for _, same := range []string{
		"id -u; id -g", "ulimit -n", "umask", "ls /proc/self/fd", "ls / /home /tmp",
		"cut -d' ' -f5,6 /proc/self/stat", // process group, session
		"grep -E 'SigBlk|SigIgn' /proc/self/status",
	} {
		a, b := outside(t, same), inside(t, same)
		for try := 1; a != b && try < 10; try++ { // others may use /tmp
			a, b = outside(t, same), inside(t, same)
		}
		if a != b {
			t.Errorf("%s: outside %q, inside %q", same, a, b)
		}
	}
	checkNetworkInside(t)
	if a, b := outside(t, "ls /sys/fs/cgroup"), inside(t, "ls /sys/fs/cgroup"); a != b {
		t.Errorf("/sys/fs/cgroup: outside %q, inside %q", a, b)
	}
	want := "nameserver 192.0.2.53\nnameserver 2001:db8::53\n"
	if out := inside(t, "cat /etc/resolv.conf"); !strings.HasPrefix(out, want) {
		t.Errorf("resolv.conf %q", out)
	}
	if out := outside(t, "cat /etc/resolv.conf"); strings.Contains(out, "192.0.2.53") {
		t.Errorf("the host's resolv.conf %q", out)
	}
	mounts := "sed 's/.* - //' /proc/self/mountinfo"
	before := outside(t, mounts)
	inside(t, "true")
	if after := outside(t, mounts); after != before {
		t.Errorf("mounts outside became %q, were %q", after, before)
	}
	caps := inside(t, "grep -E 'Cap(Inh|Prm|Eff|Amb)|NoNewPrivs' /proc/self/status | tr -d '\\t'")
	if isRoot() {
		if want := outside(t, "grep -E 'Cap(Inh|Prm|Eff|Amb)|NoNewPrivs' /proc/self/status | tr -d '\\t'"); caps != want {
			t.Errorf("capabilities %q, outside %q", caps, want)
		}
	} else if none := strings.Repeat("0", 16); caps != "CapInh:"+none+"\nCapPrm:"+none+"\nCapEff:"+none+"\nCapAmb:"+none+
		"\nNoNewPrivs:1\n" {
		t.Errorf("capabilities %q", caps)
	}
}

// checkNetworkInside looks at the interfaces, addresses, routes and sysctls inside.
func checkNetworkInside(t *testing.T) {
	t.Helper()
	if out := inside(t, "sed 1,2d /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort"); out != "lo\ntun0\n" {
		t.Errorf("interfaces %q", out)
	}
	if out := inside(t, "ls /sys/class/net"); out != "lo\ntun0\n" {
		t.Errorf("/sys/class/net %q", out)
	}
	out := inside(t, "ip -br addr; ip route; ip -6 route show default")
	for _, want := range []string{"127.0.0.1/8", "10.77.0.1/32 fd00:77::1/128 \n", "\ndefault dev tun0 scope link",
		"\ndefault dev tun0 metric"} {
		if !strings.Contains(out, want) {
			t.Errorf("network %q, want %q", out, want)
		}
	}
	out = inside(t, "cat /proc/sys/net/ipv4/ping_group_range "+
		"/proc/sys/net/ipv6/conf/tun0/accept_ra /proc/sys/net/ipv4/ip_unprivileged_port_start")
	if gid := os.Getgid(); out != fmt.Sprintf("%d\t%d\n0\n0\n", gid, gid) {
		t.Errorf("sysctls %q", out)
	}
}

// outside returns what a script prints on the host.
func outside(t *testing.T, script string) string {
	t.Helper()
	b, err := exec.Command("sh", "-c", script).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// inside returns what a script prints in a namespace.
func inside(t *testing.T, script string) string {
	t.Helper()
	out, exit, err := run(t, testSpec("sh", "-c", script))
	if exit != 0 || err != nil {
		t.Fatalf("%s: %q, %d, %v", script, out, exit, err)
	}
	return out
}

// TestSpawnInheritedFiles has a caller that was started with two descriptors more: one where the helper's socket would
// go, one far off.
func TestSpawnInheritedFiles(t *testing.T) {
	spawn(t, testSpec("true")).Close() // or skip
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "VIASOCKS_TEST_SUPERVISE=exec bash -c 'echo 3 >&3; echo 200 >&200'")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = make([]*os.File, 200-3+1)
	cmd.ExtraFiles[0], cmd.ExtraFiles[200-3] = w, w
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
	w.Close()
	if b, err := io.ReadAll(r); string(b) != "3\n200\n" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// TestSpawnTraffic has the program's packets on the TUN that was handed over, and its sockets on the Diag.
func TestSpawnTraffic(t *testing.T) {
	fds := testkit.CountFiles(t)
	s := testSpec("bash", "-c", "exec 9<>/dev/udp/203.0.113.1/6881; echo -n hello >&9; read line")
	s.TUN.VnetHdr = false
	stdin, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s.Stdin = stdin
	c := spawn(t, s)
	stdin.Close()
	if c.TUNName != "tun0" || !c.IPv6 || c.DiagErr != nil || c.TUNIndex == 0 || c.Rootless == isRoot() {
		t.Errorf("%+v", c)
	}
	if err := c.Exec(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2000)
	c.TUN[0].SetReadDeadline(time.Now().Add(testkit.Patience))
	for {
		n, err := c.TUN[0].Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.HasSuffix(b[:n], []byte("hello")) {
			break
		}
	}
	src := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), uint16(b[20])<<8|uint16(b[21]))
	dst := netip.MustParseAddrPort("203.0.113.1:6881")
	if src.Addr() != netip.MustParseAddr("10.77.0.1") {
		t.Errorf("source %s", src)
	}
	expect(t, c.Diag, "the program's socket", 17, src, dst, true)
	w.Close()
	if exit, err := c.Wait(); exit != 1 || err != nil {
		t.Errorf("%d, %v", exit, err)
	}
	expect(t, c.Diag, "the program's socket after its end", 17, src, dst, false)
	if err := c.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Signal after the end: %v", err)
	}
	c.Close()
	c.Close()
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}

func TestSpawnSignal(t *testing.T) {
	c := spawn(t, testSpec("sleep", "60"))
	defer c.Close()
	if err := c.Exec(); err != nil {
		t.Fatal(err)
	}
	if err := c.Exec(); err != nil {
		t.Errorf("second Exec: %v", err)
	}
	testkit.Eventually(t, "exec", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c.pid))
		return string(b) == "sleep\n"
	})
	if err := c.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if exit, err := c.Wait(); exit != 128+15 || err != nil {
		t.Errorf("%d, %v", exit, err)
	}
}

// TestSpawnAbandoned: without its go-ahead the helper ends, whether Close, the context or the caller's death leaves it.
func TestSpawnAbandoned(t *testing.T) {
	fds := testkit.CountFiles(t)
	c := spawn(t, testSpec("touch", "/tmp/viasocks-must-not-run"))
	c.Close()
	if err := syscall.Kill(c.pid, 0); err != syscall.ESRCH {
		t.Errorf("after Close: %v", err)
	}
	c = spawn(t, testSpec("touch", "/tmp/viasocks-must-not-run"))
	c.conn.Close() // what the caller's death does
	if exit, err := c.Wait(); exit != 1 || err != nil {
		t.Errorf("%d, %v", exit, err)
	}
	c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Spawn(ctx, testSpec("true")); !errors.Is(err, context.Canceled) {
		t.Errorf("with a cancelled context: %v", err)
	}
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
	if _, err := os.Stat("/tmp/viasocks-must-not-run"); err == nil {
		t.Error("the program ran")
	}
}

// superviseIfAsked is a process that runs a script as viasocks would, for the tests in which that process suffers.
func superviseIfAsked() {
	script := os.Getenv("VIASOCKS_TEST_SUPERVISE")
	if script == "" {
		return
	}
	s := testSpec("sh", "-c", script)
	s.FollowStops = true
	c, err := Spawn(context.Background(), s)
	if err == nil {
		defer c.Close()
		err = c.Exec()
	}
	exit := 1
	if err == nil {
		exit, err = c.Wait()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(exit)
}

func TestSpawnFollowsStops(t *testing.T) {
	spawn(t, testSpec("true")).Close() // or skip
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "VIASOCKS_TEST_SUPERVISE=kill -TSTP $$; exit 5")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as a shell's job
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(cmd.Process.Pid, &ws, syscall.WUNTRACED, nil); err != nil || !ws.Stopped() {
		t.Fatalf("the caller did not stop: %#x, %v", ws, err)
	}
	syscall.Kill(cmd.Process.Pid, syscall.SIGCONT)
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Errorf("after it was continued: %v", err)
	}
}

// TestSpawnCallerKilled: nothing but the caller holds the TUN.
func TestSpawnCallerKilled(t *testing.T) {
	spawn(t, testSpec("true")).Close() // or skip
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(
		os.Environ(),
		"VIASOCKS_TEST_SUPERVISE=echo up; while grep -q tun0 /proc/net/dev; do sleep 0.02; done; ip route; "+
			"cut -d: -f1 /proc/net/dev | sed 1,2d; echo end",
	)
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(3 * testkit.Patience))
	up := make([]byte, 3)
	if _, err := io.ReadFull(r, up); err != nil || string(up) != "up\n" {
		t.Fatalf("%q, %v", up, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if b, err := io.ReadAll(r); string(b) != "    lo\nend\n" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// TestSpawnUnixSockets: unix sockets with a path are reached from inside, abstract ones are not.
func TestSpawnUnixSockets(t *testing.T) {
	abstract := fmt.Sprintf("vs-test-%d", os.Getpid())
	path := filepath.Join(t.TempDir(), "socket")
	for _, a := range []string{"@" + abstract, path} {
		l, err := net.Listen("unix", a)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	if b, err := os.ReadFile("/proc/net/unix"); err != nil || !bytes.Contains(b, []byte("@"+abstract)) ||
		!bytes.Contains(b, []byte(path)) {
		t.Fatalf("the control: %v\n%s", err, b)
	}
	script := `grep -c @` + abstract + ` /proc/self/net/unix; test -S "$1" && echo path`
	out, _, err := run(t, testSpec("/bin/sh", "-c", script, "sh", path))
	if out != "0\npath\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
}
