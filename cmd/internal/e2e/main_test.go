package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
)

const (
	envInside = "E2E_INSIDE" // set in the test process that is inside its namespaces: path of the viasocks binary
	envAgent  = "E2E_AGENT"  // set in the captured program: the unix socket to serve on
	envWhy    = "E2E_SKIP"   // why the tests are skipped

	envRetries = "E2E_SYN_RETRIES" // the agent's tcp_syn_retries

	world4 = "203.0.113.1"
	world6 = "2001:db8::1"
	// A second address for what must not be the first.
	other4 = "203.0.113.2"
	other6 = "2001:db8::2"
)

// patience is for what must happen, on a machine that may stall for seconds.
const patience = 30 * time.Second

var viasocks string // the viasocks under test

func TestMain(m *testing.M) {
	if path := os.Getenv(envAgent); path != "" {
		os.Exit(agentMain(path))
	}
	if viasocks = os.Getenv(envInside); viasocks != "" {
		if err := makeWorld(); err != nil {
			os.Setenv(envWhy, err.Error())
		}
		os.Exit(m.Run())
	}
	code, err := reenter()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

// reenter builds viasocks and runs the tests again inside new namespaces.
func reenter() (int, error) {
	dir, err := os.MkdirTemp("", "viasocks-e2e-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // the rootless test runs the binary as another user
		return 0, err
	}
	bin := filepath.Join(dir, "viasocks")
	args := []string{"build", "-o", bin}
	if raceEnabled {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, "github.com/viasocks/viasocks/cmd/viasocks")...)
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return 0, fmt.Errorf("cannot build viasocks: %w", err)
	}

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), envInside+"="+bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		return exit.ExitCode(), nil
	}
	// No namespaces here: run in place, so that each test says why it is skipped.
	os.Setenv(envWhy, "cannot make a network namespace: "+err.Error())
	os.Setenv(envInside, bin)
	cmd = exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return 0, cmd.Run()
}

// makeWorld gives the namespace its addresses. Nothing here can reach anything outside.
func makeWorld() error {
	runtime.LockOSThread() // mounts and addresses belong to the process's namespaces; the lock is for clarity of errors only
	defer runtime.UnlockOSThread()
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make the mounts private: %w", err)
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"addr", "add", world4 + "/32", "dev", "lo"},
		{"addr", "add", other4 + "/32", "dev", "lo"},
		{"addr", "add", world6 + "/128", "dev", "lo", "nodad"},
		{"addr", "add", other6 + "/128", "dev", "lo", "nodad"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("cannot make the world: ip %v: %w: %s", args, err, out)
		}
	}
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		return fmt.Errorf("cannot open /dev/net/tun: %w", err)
	} else {
		f.Close()
	}
	return nil
}

// needWorld skips a test where the namespaces could not be made.
func needWorld(t testing.TB) {
	t.Helper()
	if why := os.Getenv(envWhy); why != "" {
		t.Skip(why)
	}
}
