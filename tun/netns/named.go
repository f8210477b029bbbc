package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// namedDir is where ip-netns(8) keeps named namespaces.
const namedDir = "/run/netns"

// lockWait is how long openNamed waits for a process that is just restoring the namespace.
const lockWait = 3 * time.Second

// openNamed opens a named network namespace and locks it, so that one program of ours at a time uses it. The lock ends when the
// file and all its copies are closed.
func openNamed(name string) (*os.File, error) {
	if name == "" || name == "." || name == ".." || strings.Contains(name, "/") {
		return nil, fmt.Errorf("cannot use the network namespace %q: it is not a name of 'ip netns'", name)
	}
	f, err := os.Open(filepath.Join(namedDir, name))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("cannot use the network namespace %q: there is none: make it with 'ip netns add %[1]s'", name)
	case err != nil:
		return nil, fmt.Errorf("cannot use the network namespace %q: %w", name, errors.Unwrap(err))
	}
	if kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("cannot use the network namespace %q: %s is not one", name, filepath.Join(namedDir, name))
	}
	for end := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("cannot use the network namespace %q: another viasocks uses it: see 'viasocks ps'", name)
		}
		return nil, fmt.Errorf("cannot lock the network namespace %q: %w", name, err)
	}
	return f, nil
}

// within calls f on a thread that is in the network namespace ns; nil: in the caller's. Processes that f starts are in it, too.
func within(ns *os.File, f func() error) error {
	if ns == nil {
		return f()
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: if the thread cannot return, it ends with this goroutine
		old, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			result <- err
			return
		}
		defer old.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("cannot enter the network namespace: %w", err)
			return
		}
		err = f()
		if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}
