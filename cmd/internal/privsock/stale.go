package privsock

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"
)

// staleWait limits the connection attempt that finds out whether somebody listens.
const staleWait = time.Second

var (
	errListens  = errors.New("another process listens there: choose another path")
	errOtherUse = errors.New("another file is there: remove it, or choose another path")
)

// RemoveStale removes a unix socket on which nobody listens any more. It returns an error if somebody listens or if
// path is another kind of file. It does nothing if path does not exist.
func RemoveStale(path string) error { return remove(path, true) }

// RemoveUnused is RemoveStale for a caller that knows, by a lock, that nobody uses the socket.
func RemoveUnused(path string) error { return remove(path, false) }

func remove(path string, ask bool) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != os.ModeSocket {
		return errOtherUse
	}
	if ask {
		c, err := net.DialTimeout("unix", path, staleWait)
		if err == nil {
			c.Close()
			return errListens
		}
		if errors.Is(err, syscall.EAGAIN) { // its backlog is full
			return errListens
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return err
		}
	}
	return os.Remove(path)
}
