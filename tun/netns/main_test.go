package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// inNamespace says that the tests run in a network namespace of their own; else noNamespace says why not.
const inNamespace = "VIASOCKS_TEST_NAMESPACE"

var noNamespace string

// TestMain runs the tests once more in a network namespace of their own, without root in a user namespace as well. The
// binary is also the helper that Spawn starts.
func TestMain(m *testing.M) {
	MainIfChild()
	superviseIfAsked()
	attachIfAsked()
	if os.Getenv(inNamespace) != "" && os.Geteuid() == 0 {
		ownMounts()
	}
	if os.Getenv(inNamespace) == "" && !fuzzWorker() {
		remove := coverHelpers()
		defer remove() // where there is no namespace
		if code, err := reenter(); err == nil {
			remove()
			os.Exit(code)
		} else {
			noNamespace = err.Error()
		}
	}
	testkit.Main(m)
}

// coverHelpers gives the helpers of Spawn, which are this binary, a directory for their coverage that every user may write to.
// What the go command names is its own user's, and the error would be in the program's output.
func coverHelpers() (remove func()) {
	if testing.CoverMode() == "" {
		return func() {}
	}
	dir, err := os.MkdirTemp("", "coverage")
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err == nil {
		err = os.Setenv("GOCOVERDIR", dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot make a directory for the helpers' coverage:", err)
		os.Exit(1)
	}
	return func() { os.RemoveAll(dir) }
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
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
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

// ownMounts keeps the tests' mounts in their namespace and gives it a TUN node that everyone may open, for the tests
// without root: the host's own is left as it is. It can't be made in a user namespace.
func ownMounts() {
	// Cut off from the host, then shared as a host's are, so that a mount which gets out of a program's namespace shows.
	for _, how := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", unix.MS_REC|how, ""); err != nil {
			fmt.Fprintln(os.Stderr, "cannot make the mounts private:", err)
			os.Exit(1)
		}
	}
	if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, "mode=755"); err != nil {
		return
	}
	if err := unix.Mknod(tunNode, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		unix.Unmount("/dev/net", 0)
		return
	}
	os.Chmod(tunNode, 0o666)
}
