package servicetest

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

const (
	envInside = "SERVICETEST_INSIDE" // the path of the viasocks under test
	envBinary = "SERVICETEST_BINARY" // the viasocks to test, instead of one that is built from the source
	envWhy    = "SERVICETEST_SKIP"   // why the tests are skipped
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
	// The test is the first process of its process namespace, so that systemd and its services end with it.
	code, err := harness.Reenter(os.Getenv(envBinary), envInside, envWhy,
		syscall.CLONE_NEWNET|syscall.CLONE_NEWNS|syscall.CLONE_NEWPID)
	if err != nil {
		fmt.Fprintln(os.Stderr, "servicetest:", err)
		code = 1
	}
	os.Exit(code)
}

const (
	worldNetns = "/run/netns/world"
	// groups is the folder in which the control group of a machine is made.
	groups  = "/run/cgroup2"
	systemd = "/lib/systemd/systemd"
)

// prepare makes a mount namespace in which the tests have their own /proc and /run, and the control groups of
// version 2, which systemd needs.
func prepare() error {
	if os.Getuid() != 0 {
		return errors.New("systemd as the first process of a container needs root")
	}
	for _, program := range []string{systemd, "/usr/bin/systemctl", "/usr/bin/nsenter", "/usr/bin/unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			return err
		}
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, m := range []struct{ fs, at string }{{"proc", "/proc"}, {"tmpfs", "/run"}, {"cgroup2", groups}} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(m.fs, m.at, m.fs, 0, ""); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.at, err)
		}
	}
	return harness.CheckTUN()
}
