package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Path is the socket of the daemon in the network namespace of the caller, below dir, where a viasocks that is up keeps what it
// must. A directory may be shared by namespaces: the namespace's inode is in the name.
func Path(dir string) (string, error) {
	var st syscall.Stat_t
	if err := syscall.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return "", fmt.Errorf("cannot identify the network namespace: %w", err)
	}
	return filepath.Join(dir, fmt.Sprintf("control-%d.sock", st.Ino)), nil
}

// makeDir makes the directory of path and refuses one that others could put something into.
func makeDir(path string) error {
	dir := filepath.Dir(path)
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("%w: choose a directory that can be written by --state-dir", err)
	}
	if err != nil && !os.IsExist(err) {
		return err
	}
	made := err == nil
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || st.Uid != 0 && int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is not a directory of root's alone: remove it, or make it one (chown root, chmod 755)", dir)
	}
	if info.Mode().Perm()&0o055 != 0o055 && made {
		return os.Chmod(dir, 0o755) // the umask was narrow: the socket says who may
	}
	return nil
}
