package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// One network namespace has one daemon, whatever the state directories; and nobody without privilege can keep root out.
func TestTakeHost(t *testing.T) {
	testkit.CheckLeaks(t)
	if os.Getuid() != 0 {
		t.Skip("no root: the namespace would need a user namespace")
	}
	done := make(chan struct{})
	go func() { // its thread is in another namespace, and ends with it
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		testTakeHost(t)
	}()
	<-done
}

func testTakeHost(t *testing.T) {
	path := func() string { return filepath.Join(t.TempDir(), "control-1.sock") }
	l, err := TakeHost(path())
	if err != nil {
		t.Error(err)
		return
	}
	_, err = TakeHost(path())
	want := fmt.Sprintf(
		"cannot steer the host: another viasocks is up here with another state directory (process %d): give the same --state-dir",
		os.Getpid(),
	)
	if !errors.Is(err, ErrLocked) || !strings.HasPrefix(err.Error(), want) {
		t.Error(err)
	}
	l.Close()
	elsewhere := path()
	if l, err = TakeHost(elsewhere); err != nil {
		t.Error(err)
		return
	}
	if l.claim == nil {
		t.Error("it has no claim")
	}
	l.Close()

	ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(ns)
	squatter := make(chan error)
	over := make(chan struct{})
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		runtime.LockOSThread()
		fd, err := squat(ns)
		squatter <- err
		<-over
		unix.Close(fd)
	}()
	err = <-squatter
	defer func() { close(over); <-gone }()
	if err != nil {
		t.Error(err)
		return
	}
	if l, err = TakeHost(elsewhere); err != nil {
		t.Errorf("somebody without privilege keeps root out: %v", err)
		return
	}
	l.Close()
}

// squat holds the name as nobody. Its thread must end.
func squat(ns int) (fd int, err error) {
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return -1, err
	}
	const nobody = 65534
	if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
		return -1, errno
	}
	if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: claimName}); err == nil {
		err = unix.Listen(fd, 1)
	}
	return fd, err
}
