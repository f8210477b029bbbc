// Package harness is shared by the tests with a real kernel: it provides the viasocks under test, separate
// namespaces, the output of a program, and a socket from another process.
package harness

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Reenter builds viasocks from the source, with the race detector if the tests have it and otherwise without cgo, or
// uses the binary bin if that is set. Then it runs the tests again with the path in the environment variable inside,
// and returns their exit code. They run in new namespaces according to flags (CLONE_NEW…), without root also in a
// user namespace. If these cannot be created, the tests run in place, and the variable why contains the reason, for
// the message with which each test skips.
//
// With -short there are no namespaces: these tests take minutes, and the short ones are for every change.
func Reenter(bin, inside, why string, flags uintptr) (int, error) {
	if flag.Parse(); testing.Short() {
		return inPlace(bin, inside, why, "the short tests make no namespaces")
	}
	if bin == "" {
		dir, err := os.MkdirTemp("", "viasocks-test-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil { // a test may run the binary as another user
			return 0, err
		}
		bin = filepath.Join(dir, "viasocks")
		args := []string{"build", "-o", bin}
		if Race {
			args = append(args, "-race")
		}
		build := exec.Command("go", append(args, "github.com/viasocks/viasocks/cmd/viasocks")...)
		build.Stderr = os.Stderr
		if !Race { // as the Makefile builds it
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
		}
		if err := build.Run(); err != nil {
			return 0, fmt.Errorf("cannot build viasocks: %w", err)
		}
	}
	runtime.LockOSThread() // Pdeathsig follows the thread that forks
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"="+bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		return exit.ExitCode(), nil
	}
	return inPlace(bin, inside, why, "cannot make namespaces: "+err.Error())
}

// inPlace runs the tests again without namespaces. Those that need one find the reason in the variable why.
func inPlace(bin, inside, why, reason string) (int, error) {
	if bin == "" {
		bin = "-" // there is none, and nothing runs it
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"="+bin, why+"="+reason)
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// CheckTUN returns why no TUN device can be created.
func CheckTUN() error {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot open /dev/net/tun: %w", err)
	}
	return f.Close()
}

// Log collects the output of a program. Its methods may be called from any goroutine.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns the whole output.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Tail returns the last lines of s.
func Tail(s string, lines int) string {
	all := strings.Split(s, "\n")
	if len(all) > lines {
		all = append([]string{fmt.Sprintf("(%d lines before)", len(all)-lines)}, all[len(all)-lines:]...)
	}
	return strings.Join(all, "\n")
}

// Descriptor returns the descriptor that came with oob. The caller closes it.
func Descriptor(oob []byte) (int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("no descriptor arrived: %v", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("no descriptor arrived: %v", err)
	}
	return fds[0], nil
}
