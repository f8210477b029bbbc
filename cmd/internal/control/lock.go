package control

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// ErrLocked means that another daemon is alive in this namespace.
var ErrLocked = errors.New("another viasocks is up here")

// Lock is held by the only daemon of a namespace until it is closed or its process ends.
type Lock struct {
	f     *os.File
	path  string
	claim *net.UnixListener // of TakeHost; nil: none
}

// TakeLock takes the lock next to the socket path and writes the caller's process id into it. If a daemon is alive,
// the error is ErrLocked with that daemon's process id.
func TakeLock(path string) (*Lock, error) {
	fail := func(err error) error { return fmt.Errorf("cannot lock %s: %w", path, err) }
	if err := privsock.MakeDir(filepath.Dir(path)); err != nil {
		return nil, fail(err)
	}
	for {
		f, err := openLock(path, os.O_RDWR|os.O_CREATE)
		if err != nil {
			return nil, fail(err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("cannot start: %w%s: see 'viasocks status'", ErrLocked, holder(f))
			f.Close()
			return nil, err
		}
		if err == nil && !inPlace(f) { // its holder has just removed it
			f.Close()
			continue
		}
		if err != nil {
			f.Close()
			return nil, fail(err)
		}
		l := &Lock{f: f, path: f.Name()}
		l.Sign()
		return l, nil
	}
}

// Files returns copies of what the lock consists of, for another viasocks, which passes them to AdoptHost. The caller
// closes them.
func (l *Lock) Files() (files []*os.File, err error) {
	fd, err := unix.FcntlInt(l.f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	files = append(files, os.NewFile(uintptr(fd), l.path))
	if l.claim == nil {
		return files, nil
	}
	c, err := l.claim.File()
	if err != nil {
		files[0].Close()
		return nil, err
	}
	return append(files, c), nil
}

// AdoptHost makes a Lock next to the socket path of what another viasocks got from Files. Both hold it from now on.
// The files stay the caller's.
func AdoptHost(path string, files []*os.File) (*Lock, error) {
	fail := func(err error) (*Lock, error) {
		return nil, fmt.Errorf("cannot take over the lock of %s: %w", path, err)
	}
	if len(files) == 0 || len(files) > 2 {
		return fail(errors.New("the other viasocks did not send it"))
	}
	fd, err := unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fail(err)
	}
	l := &Lock{f: os.NewFile(uintptr(fd), lockPath(path)), path: lockPath(path)}
	if !inPlace(l.f) {
		l.f.Close()
		return fail(errors.New("the other viasocks holds another file"))
	}
	if len(files) == 2 {
		c, err := net.FileListener(files[1])
		if err != nil {
			l.f.Close()
			return fail(err)
		}
		u, ok := c.(*net.UnixListener)
		if !ok {
			c.Close()
			l.f.Close()
			return fail(errors.New("the other viasocks sent something else"))
		}
		l.claim = u
	}
	return l, nil
}

// Sign writes the caller's process id into the lock. After AdoptHost it is called once the other viasocks has let go.
func (l *Lock) Sign() {
	// The number is only for messages of other processes. A full disk must not keep 'down' from restoring the host.
	if l.f.Truncate(0) == nil {
		_, _ = l.f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
}

// Leave ends our use of a lock that another viasocks holds, too.
func (l *Lock) Leave() error {
	if l.claim != nil {
		l.claim.Close()
	}
	return l.f.Close()
}

// inPlace reports whether f is still the file that its name refers to.
func inPlace(f *os.File) bool {
	a, err := f.Stat()
	b, err2 := os.Lstat(f.Name())
	return err == nil && err2 == nil && os.SameFile(a, b)
}

// Close releases the lock and removes the file. It may be called twice.
func (l *Lock) Close() error {
	if l.claim != nil {
		l.claim.Close() // first, because the next holder of the file must find it free
	}
	if inPlace(l.f) {
		os.Remove(l.path) // while it is held: see TakeLock
	}
	return l.f.Close()
}

// Locked reports whether a daemon is alive, whether or not it answers.
func Locked(path string) bool {
	f, err := openLock(path, os.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

func openLock(path string, flags int) (*os.File, error) {
	return os.OpenFile(lockPath(path), flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
}

func lockPath(socket string) string { return strings.TrimSuffix(socket, ".sock") + ".lock" }

// holder returns " (process 123)", for a message.
func holder(f *os.File) string {
	b := make([]byte, 32)
	n, _ := f.ReadAt(b, 0)
	if pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n]))); err == nil && pid > 0 {
		return fmt.Sprintf(" (process %d)", pid)
	}
	return ""
}
