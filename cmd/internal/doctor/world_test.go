package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/socks/sockstest"
)

const (
	envInside = "DOCTORTEST_INSIDE" // the path of the viasocks under test
	envWhy    = "DOCTORTEST_SKIP"   // why there are no namespaces
)

var viasocks string

func TestMain(m *testing.M) {
	if viasocks = os.Getenv(envInside); viasocks != "" {
		if os.Getenv(envWhy) == "" {
			if err := prepare(); err != nil {
				os.Setenv(envWhy, err.Error())
			}
		}
		flag.Parse()
		os.Exit(m.Run())
	}
	code, err := harness.Reenter("", envInside, envWhy, syscall.CLONE_NEWNET|syscall.CLONE_NEWNS|syscall.CLONE_NEWPID)
	if err != nil {
		fmt.Fprintln(os.Stderr, "doctor:", err)
		code = 1
	}
	os.Exit(code)
}

// The two ends of the way to the proxy, which is in a namespace of its own.
const (
	here4, there4 = "198.51.100.1", "198.51.100.2"
	there4b       = "198.51.100.3"
	there6        = "2001:db8:1::2"
	proxyNetns    = "/run/netns/proxy"
)

// prepare makes a host with a way to a namespace in which the proxies are.
func prepare() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, m := range []struct{ fs, at string }{{"proc", "/proc"}, {"tmpfs", "/run"}, {"sysfs", "/sys"}} {
		if err := syscall.Mount(m.fs, m.at, m.fs, 0, ""); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.at, err)
		}
	}
	for _, l := range []string{
		"ip link set lo up", "ip netns add proxy", "ip link add eth0 type veth peer name eth0 netns proxy",
		"ip addr add " + here4 + "/24 dev eth0", "ip addr add 2001:db8:1::1/64 dev eth0 nodad", "ip link set eth0 up",
		"ip route add default via " + there4, "ip -n proxy link set lo up", "ip -n proxy addr add " + there4 + "/24 dev eth0",
		"ip -n proxy addr add " + there4b + "/24 dev eth0", "ip -n proxy addr add " + there6 + "/64 dev eth0 nodad",
		"ip -n proxy link set eth0 up",
	} {
		if out, err := exec.Command("sh", "-c", l).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", l, err, out)
		}
	}
	return harness.CheckTUN()
}

func needWorld(t *testing.T) {
	t.Helper()
	if why := os.Getenv(envWhy); why != "" {
		t.Skip(why)
	}
}

func sh(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
}

// proxyAt makes a SOCKS server in the namespace of the proxies.
func proxyAt(t *testing.T, fault func(sockstest.Request) sockstest.Fault, opts ...sockstest.Option) *sockstest.Server {
	t.Helper()
	s, err := sockstest.Listen("tcp4", there4+":0", append([]sockstest.Option{
		sockstest.WithNetns(proxyNetns), sockstest.WithResolve(resolve),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if fault != nil {
		s.SetFault(fault)
	}
	return s
}

func resolve(name string) (netip.Addr, error) {
	if name == "far.example" {
		return netip.MustParseAddr(there4), nil
	}
	return netip.Addr{}, errors.New("no such name")
}

// result is what a doctor said, and how it ended.
type result struct {
	Report
	exit int
	text string
}

// run runs a command that prints a report in JSON.
func run(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	err := cmd.Run()
	r := result{text: out.String() + errOut.String()}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		r.exit = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out.Bytes(), &r.Report); err != nil {
		t.Fatalf("%v\n%s", err, r.text)
	}
	if want := min(r.Faults, 1); r.exit != want {
		t.Errorf("exit status %d for %d faults\n%s", r.exit, r.Faults, errOut.String())
	}
	return r
}

func examine(t *testing.T, args ...string) result {
	t.Helper()
	cmd := exec.Command(viasocks, append([]string{"doctor", "--json"}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/"}
	return run(t, cmd)
}

// find is the finding of a check; it fails where there is none.
func (r *result) find(t *testing.T, check string) Finding {
	t.Helper()
	for _, f := range r.Findings {
		if f.Check == check {
			return f
		}
	}
	t.Fatalf("nothing about %q in\n%s", check, r.text)
	return Finding{}
}

// is checks the level of a finding, and that all of words are in it.
func (r *result) is(t *testing.T, check string, l Level, words ...string) {
	t.Helper()
	f := r.find(t, check)
	if f.Level != l {
		t.Errorf("%s: %s: %s %s; want %s", check, f.Level, f.Found, f.Means, l)
	}
	for _, w := range words {
		if !strings.Contains(f.Found+"\n"+f.Means+"\n"+f.Do, w) {
			t.Errorf("%s: no %q in %+v", check, w, f)
		}
	}
}

// onlyFaults checks that nothing but these checks is at fault.
func (r *result) onlyFaults(t *testing.T, checks ...string) {
	t.Helper()
	for _, f := range r.Findings {
		if f.Level == Fault && !strings.Contains(" "+strings.Join(checks, " ")+" ", " "+strings.ReplaceAll(f.Check, " ", "_")+
			" ") {
			t.Errorf("a fault too many: %+v", f)
		}
	}
}

// tunForAll puts a node that everybody may open over the host's, in the tests' own mount namespace.
func tunForAll(t *testing.T) {
	t.Helper()
	node := filepath.Join(t.TempDir(), "tun")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		t.Skipf("cannot make a device node: %v", err)
	}
	if err := errors.Join(os.Chmod(node, 0o666), unix.Mount(node, tunNode, "", unix.MS_BIND, "")); err != nil {
		t.Skipf("cannot bind it: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(tunNode, unix.MNT_DETACH) })
}
