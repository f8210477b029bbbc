package privsock

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path that fits into the address of a unix socket.
const maxPath = 107

// Listen makes a unix socket of mode 0600 at path, where no file must be. If group is not negative, the socket belongs
// to that group and has mode 0660.
//
// No other user can connect at any time, and the process's umask, which all threads share, does not change: the kernel
// takes the mode of a new socket from its descriptor, so the mode is right before the socket has a name. Only its
// owner can use it until it has its group. It gets its final name when it listens already, so a socket on which nobody
// listens is always one that a dead process has left behind; see RemoveStale.
func Listen(path string, group int) (*Listener, error) {
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err.(*os.PathError).Err
	}
	l := &Listener{dir: dir, name: filepath.Base(path)}
	if l.UnixListener, err = l.listen(path, group); err != nil {
		dir.Close()
		return nil, err
	}
	return l, nil
}

// listen makes the socket under another name first, and closes everything but the directory if it fails.
func (l *Listener) listen(path string, group int) (*net.UnixListener, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	sock := os.NewFile(uintptr(fd), path)
	defer sock.Close() // FileListener duplicates it
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, err
	}
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails
	fresh := ".vs-" + hex.EncodeToString(random[:])
	at := filepath.Join(filepath.Dir(path), fresh)
	if len(at) > maxPath {
		at = fmt.Sprintf("/proc/self/fd/%d/%s", l.dir.Fd(), fresh)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: at}); err != nil {
		return nil, err
	}
	dir := int(l.dir.Fd())
	if err = giveTo(dir, fresh, group); err == nil {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	if err == nil {
		err = rename(dir, fresh, l.name)
	}
	if err != nil {
		_ = unix.Unlinkat(dir, fresh, 0)
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstatat(dir, l.name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
		l.dev, l.ino = st.Dev, st.Ino
		var ln net.Listener
		if ln, err = net.FileListener(sock); err == nil {
			return ln.(*net.UnixListener), nil
		}
	}
	_ = unix.Unlinkat(dir, l.name, 0)
	return nil, err
}

// giveTo lets the members of a group use a socket.
func giveTo(dir int, name string, group int) error {
	if group < 0 {
		return nil
	}
	if err := unix.Fchownat(dir, name, -1, group, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	return unix.Fchmodat(dir, name, 0o660, 0)
}

// rename gives a file its name unless another file has it.
func rename(dir int, from, to string) error {
	err := unix.Renameat2(dir, from, dir, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // the file system does not support this kind of rename
		if err = unix.Linkat(dir, from, dir, to, 0); err == nil {
			err = unix.Unlinkat(dir, from, 0)
		}
	}
	return err
}

// Listener removes its socket when it is closed, unless another file has taken the name.
type Listener struct {
	*net.UnixListener
	dir      *os.File
	name     string
	dev, ino uint64
	once     sync.Once
}

// Close implements net.Listener. It may be called twice.
func (l *Listener) Close() error {
	l.once.Do(func() {
		var st unix.Stat_t
		dir := int(l.dir.Fd())
		if unix.Fstatat(dir, l.name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Dev == l.dev && st.Ino == l.ino {
			_ = unix.Unlinkat(dir, l.name, 0) // if it fails, the next start removes it
		}
		l.dir.Close()
	})
	return l.UnixListener.Close()
}
