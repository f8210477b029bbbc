package privsock

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MakeDir creates a directory for sockets that other users may reach, and refuses one in which other users could
// create files.
func MakeDir(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%w: choose a directory that can be written by --state-dir", err)
	}
	if err != nil && !os.IsExist(err) {
		return err
	}
	made := err == nil
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() || !ownDir(&st, 0o022) {
		return fmt.Errorf("%s is not a directory of root's alone: remove it, or make it one (chown root, chmod 755)", dir)
	}
	if st.Mode&0o055 != 0o055 && made {
		return os.Chmod(dir, 0o755) // the umask was narrow; the socket's own mode protects it
	}
	return nil
}

// OpenDir opens a directory that only the user uid can access. It refuses a symbolic link, and a directory that
// belongs to another user or is accessible to others.
func OpenDir(path string, uid int) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("cannot use %s: it is not a directory: remove it", path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	if int(st.Uid) != uid || !ownDir(&st, 0o077) {
		f.Close()
		return nil, fmt.Errorf("cannot use %s: it belongs to another user, or others may use it: remove it", path)
	}
	return f, nil
}

// IsOwnDir reports whether path is a directory of uid's in which other users cannot create files.
func IsOwnDir(path string, uid int) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && int(st.Uid) == uid && ownDir(&st, 0o022)
}

// ownDir reports whether st is a directory on which others have none of the given permissions.
func ownDir(st *unix.Stat_t, others uint32) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Mode&others == 0
}
