package tun

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// inNamespace says that the tests run in a network namespace of their own; else noNamespace says why not.
const inNamespace = "VIASOCKS_TEST_NAMESPACE"

var noNamespace string

// TestMain runs the tests once more in a network namespace of their own, without root in a user namespace as well.
func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) == "" && !fuzzWorker() {
		if code, err := reenter(); err == nil {
			os.Exit(code)
		} else {
			noNamespace = err.Error()
		}
	}
	testkit.Main(m)
}

func fuzzWorker() bool {
	for _, a := range os.Args {
		if strings.HasPrefix(a, "-test.fuzzworker") {
			return true
		}
	}
	return false
}

func reenter() (int, error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("cannot make a network namespace: %w", err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode(), nil
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1, nil
	}
	return 0, nil
}
