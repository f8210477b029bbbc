package metrics

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// listenUnix creates a unix socket with mode 0600. The socket gets its final name only after it has its mode and
// listens. Therefore another user can never connect, and a socket on which nobody listens is always one that a dead
// process has left behind.
func listenUnix(path string) (net.Listener, error) {
	if err := RemoveStale(path); err != nil {
		return nil, err
	}
	fresh := filepath.Join(filepath.Dir(path), fmt.Sprintf(".m%d", os.Getpid()))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(fresh, 0o600); err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // the file system does not support this kind of rename
			err = os.Rename(fresh, path)
		}
	}
	if err != nil {
		os.Remove(fresh)
		l.Close()
		return nil, fmt.Errorf("cannot make the socket: %w", err)
	}
	return &unixListener{l, path}, nil
}

// unixListener removes its socket when it is closed, unless another socket has taken the name.
type unixListener struct {
	*net.UnixListener
	path string
}

// Close implements net.Listener.
func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	if err == nil {
		_ = RemoveStale(l.path)
	}
	return err
}

// staleWait limits the connection attempt that finds out whether somebody listens.
const staleWait = time.Second

// RemoveStale removes a unix socket on which nobody listens any more. It returns an error if somebody listens or if
// path is another kind of file. It does nothing if path does not exist.
func RemoveStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != os.ModeSocket {
		return errors.New("another file is there: remove it, or choose another path")
	}
	c, err := net.DialTimeout("unix", path, staleWait)
	if err == nil {
		c.Close()
		return errors.New("another process listens there: choose another path")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}
