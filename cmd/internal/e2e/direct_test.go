package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// needPrograms skips a test where a program is not installed.
func needPrograms(t *testing.T, names ...string) {
	t.Helper()
	needWorld(t)
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed (scripts/deps.sh)", name)
		}
	}
}

// serve starts a program that serves until stop is called or the test is over. It waits until the program answers at its TCP
// endpoint, or at the path of its unix socket.
func serve(t *testing.T, at string, name string, args ...string) (stop func()) {
	t.Helper()
	network := "tcp"
	if filepath.IsAbs(at) {
		network = "unix"
	}
	log := &harness.Log{}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	stop = sync.OnceFunc(func() { // dante's children outlive it while they have clients
		select {
		case <-ended:
			t.Logf("%s had ended: %v", name, cmd.ProcessState)
		default:
		}
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(2 * time.Second):
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-ended
		}
		if t.Failed() {
			t.Logf("%s said:\n%s", name, harness.Tail(log.String(), 60))
		}
	})
	t.Cleanup(stop)
	testkit.EventuallyIn(t, testkit.Patience, name+" serves", func() bool {
		c, err := net.DialTimeout(network, at, time.Second)
		if err == nil {
			c.Close()
		}
		select {
		case <-ended:
			t.Fatalf("%s ended (%v):\n%s", name, cmd.ProcessState, log)
		default:
		}
		return err == nil
	})
	return stop
}

// nginx serves one file with the word "served" at each of the endpoints.
func nginx(t *testing.T, at ...string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "index.html"), []byte("served"), 0o644); err != nil {
		t.Fatal(err)
	}
	listen := ""
	for _, a := range at {
		listen += "listen " + a + "; "
	}
	conf := fmt.Sprintf(`daemon off; master_process off; pid %s/pid; error_log stderr; events { }
http { access_log off; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f;
uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s; server { %s root %[1]s; } }`, dir, listen)
	file := filepath.Join(dir, "conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	serve(t, at[0], "nginx", "-c", file, "-e", "stderr")
}

// dnsmasq answers for names as the options say, on port 53 of the world, and stands in the host's resolv.conf.
func dnsmasq(t *testing.T, options ...string) {
	t.Helper()
	serve(
		t,
		world4+":53",
		"dnsmasq",
		append([]string{"--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--no-resolv",
			"--no-hosts", "--bind-interfaces", "--listen-address=" + world4, "--pid-file=", "--local-ttl=60"}, options...)...)
	target, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		t.Skipf("cannot put another resolv.conf in place: %v", err)
	}
	own := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(own, []byte("nameserver "+world4+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(own, target, "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("cannot put another resolv.conf in place: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(target, 0) })
}

// ran is what came of a program under `viasocks run`.
type ran struct {
	exit        int
	out, stderr string
	took        time.Duration
}

// run runs argv under `viasocks run` with flags.
func run(t *testing.T, flags []string, argv ...string) ran {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*testkit.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, viasocks, append(append(append([]string{"run"}, flags...), "--"), argv...)...)
	for _, e := range os.Environ() {
		if !strings.HasSuffix(strings.ToLower(strings.SplitN(e, "=", 2)[0]), "_proxy") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	start := time.Now()
	_ = cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("viasocks run %v %v did not end\n%s", flags, argv, &stderr)
	}
	return ran{cmd.ProcessState.ExitCode(), out.String(), stderr.String(), time.Since(start)}
}

// curlLimit is how long curl waits for one URL. What is refused at once ends long before.
const curlLimit = 20 * time.Second

// curl fetches each URL under `viasocks run` and prints for each its exit code and what came, such as "0 served" or "7 ". It
// fails the test if one of them took as long as half of curlLimit, whatever came of it.
func curl(t *testing.T, flags []string, urls ...string) string {
	t.Helper()
	script := ""
	for _, u := range urls {
		script += fmt.Sprintf("b=$(curl -s -m %d -w '%%{stderr}curl took %%{time_total} s\n' --noproxy '*' '%s'); echo $? $b\n",
			curlLimit/time.Second, u)
	}
	r := run(t, flags, "sh", "-c", script)
	took := regexp.MustCompile(`curl took ([0-9.]+) s\n`)
	all := took.FindAllStringSubmatch(r.stderr, -1)
	for i, m := range all {
		if s, err := strconv.ParseFloat(m[1], 64); err != nil || s >= curlLimit.Seconds()/2 {
			t.Errorf("%s took %s s: what is refused must be refused at once", urls[i], m[1])
		}
	}
	if len(all) != len(urls) {
		t.Errorf("%d URLs, and %d times: %s", len(urls), len(all), r.stderr)
	}
	if said := took.ReplaceAllString(r.stderr, ""); said != "" {
		t.Logf("standard error: %s", said)
	}
	return strings.TrimSpace(strings.ReplaceAll(r.out, " \n", "\n"))
}

// curl's exit codes: https://curl.se/docs/manpage.html.
const (
	served    = "0 served"
	noName    = "6"
	noConnect = "7"
	noAnswer  = "28"
)

// TestDirectOnly: a program runs with rules alone, without a proxy. What no rule matches is refused at once and never goes
// direct; names are resolved by the host's resolver.
func TestDirectOnly(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "nginx", "dnsmasq", "curl")
	nginx(t, world4+":8080", other4+":8080", "["+world6+"]:8080", world4+":8081")
	dnsmasq(t, "--address=/web.example/"+world4)
	urls := []string{
		"http://" + world4 + ":8080", "http://web.example:8080", "http://[" + world6 + "]:8080", // port 8080
		"http://" + world4 + ":8081", // no rule
		"http://no.example:8080",
	}
	got := curl(t, []string{"--rule", "proto tcp port 8080 direct"}, urls...)
	if want := strings.Join([]string{served, served, served, noConnect, noName}, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// Everything, and UDP with it.
	far, addr := farUDP(t, world4)
	a := startApp(t, "--rule", "direct")
	app := a.udp(false)
	testkit.EventuallyIn(
		t,
		testkit.Patience,
		"a datagram goes direct, and its answer comes",
		func() bool { return exchange(t, app, far, addr, "direct") },
	)
	// And nothing but what is named: the same datagram is refused.
	b := startApp(t, "--rule", "proto tcp direct")
	u := b.udp(false)
	fd := b.socket(syscall.AF_INET, syscall.SOCK_DGRAM)
	defer syscall.Close(fd)
	if err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
		t.Fatal(err)
	}
	send(t, u, addr, "must not arrive")
	testkit.EventuallyIn(t, testkit.Patience, "port unreachable", func() bool {
		_, err := syscall.Write(fd, []byte("must not arrive"))
		return err == syscall.ECONNREFUSED
	})
	// One that exchange has sent may come only now, if its first try was late.
	buf := make([]byte, 100)
	far.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	for n, _, err := far.ReadFrom(buf); err == nil; n, _, err = far.ReadFrom(buf) {
		if string(buf[:n]) != "direct" {
			t.Errorf("%q went direct, which no rule lets out", buf[:n])
		}
	}
}
