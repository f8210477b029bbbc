package hosttest

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

const (
	envInside = "HOSTTEST_INSIDE" // set in the test process that is inside its namespaces: path of the viasocks binary
	envAgent  = "HOSTTEST_AGENT"  // set in a process that opens sockets for the test in another cgroup
	envBinary = "HOSTTEST_BINARY" // the viasocks to test, in place of one that is built from the source
	envWhy    = "HOSTTEST_SKIP"   // why the tests are skipped
)

var viasocks string // the program under test

func TestMain(m *testing.M) {
	if os.Getenv(envAgent) != "" {
		os.Exit(agentMain())
	}
	if viasocks = os.Getenv(envInside); viasocks != "" {
		if os.Getenv(envWhy) == "" {
			if err := prepareMounts(); err != nil {
				os.Setenv(envWhy, err.Error())
			}
		}
		flag.Parse()
		if err := flag.Set("test.parallel", "1000"); err != nil { // turns says how many run at once
			fmt.Fprintln(os.Stderr, "hosttest:", err)
		}
		os.Exit(m.Run())
	}
	// The process there is the first of its process namespace: whatever happens to it, all that it started ends with it,
	// and the network namespaces with that.
	code, err := harness.Reenter(
		os.Getenv(envBinary),
		envInside,
		envWhy,
		syscall.CLONE_NEWNET|syscall.CLONE_NEWNS|syscall.CLONE_NEWPID,
	)
	if err != nil {
		fmt.Fprintln(os.Stderr, "hosttest:", err)
		code = 1
	}
	os.Exit(code)
}

// resolvConf is what stands in /etc/resolv.conf of the tests' mount namespace.
const resolvConf = "# the host's own\nnameserver " + lanRouter4 + "\nnameserver " + lanRouter6 + "\n"

// The proxy has a name, so that it can move.
const (
	proxyName = "proxy.test"
	hostsFile = "/run/hosts.test"
)

func setProxyName(to string) error {
	return os.WriteFile(hostsFile, []byte("127.0.0.1 localhost\n"+to+" "+proxyName+"\n"), 0o644)
}

// prepareMounts gives the tests a /proc of their process namespace, a /run of their own (names of network namespaces, the
// state of viasocks) and a resolv.conf that may be changed.
func prepareMounts() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make the mounts private: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("cannot mount /proc: %w", err)
	}
	target, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		return fmt.Errorf("cannot find resolv.conf: %w", err)
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("cannot mount a /run: %w", err)
	}
	if err := os.Mkdir("/run/netns", 0o755); err != nil {
		return err
	}
	own := "/run/resolv.conf.test"
	if err := os.WriteFile(own, []byte(resolvConf), 0o644); err != nil {
		return err
	}
	if _, err := os.Stat(target); err != nil { // it was below /run
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(target, nil, 0o644); err != nil {
			return err
		}
	}
	if err := syscall.Mount(own, target, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot bind a resolv.conf: %w", err)
	}
	if err := setProxyName(proxy4); err != nil {
		return err
	}
	if err := syscall.Mount(hostsFile, "/etc/hosts", "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot bind a hosts file: %w", err)
	}
	for _, name := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	return harness.CheckTUN()
}
