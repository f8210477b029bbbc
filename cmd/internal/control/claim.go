package control

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// claimName is an abstract unix socket. Such names belong to the network namespace, as do the changes of a daemon,
// and the kernel frees them when their process ends.
const claimName = "@viasocks/up"

// ErrElsewhere is an ErrLocked: the daemon that is up has another state directory, and so another lock file.
var ErrElsewhere = fmt.Errorf("%w with another state directory", ErrLocked)

// claimWait is how long a held claim may take to become free: a killed process loses its lock file first.
const claimWait = 200 * time.Millisecond

// TakeHost takes the lock next to the socket path, as TakeLock does, and claims the network namespace, because
// daemons with different state directories do not share a lock file. The error is ErrLocked if a daemon is alive.
func TakeHost(path string) (*Lock, error) {
	l, err := TakeLock(path)
	if err != nil {
		return nil, err
	}
	if l.claim, err = claim(); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// claim returns nil without an error if the name is held by a process that may not steer the host: any process can
// take the name, and must not keep root from its work that way.
func claim() (*net.UnixListener, error) {
	for end := time.Now().Add(claimWait); ; time.Sleep(10 * time.Millisecond) {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: claimName, Net: "unix"})
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("cannot claim the network namespace: %w", err)
		}
		if time.Now().Before(end) {
			continue
		}
		if pid, ok := claimant(); ok {
			return nil, fmt.Errorf(
				"cannot steer the host: %w (process %d): give the same --state-dir, or end that one first",
				ErrElsewhere,
				pid,
			)
		}
		return nil, nil
	}
}

// claimant returns the process that holds the claim if it belongs to root or to the caller's own user.
func claimant() (pid int32, ok bool) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, false
	}
	f := os.NewFile(uintptr(fd), "claim")
	defer f.Close()
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: claimName}); err != nil {
		return 0, false
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return 0, false
	}
	return cred.Pid, true
}
