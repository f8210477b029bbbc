package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Path returns the socket of the daemon in the caller's network namespace. dir is the state directory of a viasocks
// that is up. Several namespaces may share it, so the name contains the inode of the namespace.
func Path(dir string) (string, error) {
	var st syscall.Stat_t
	if err := syscall.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return "", fmt.Errorf("cannot identify the network namespace: %w", err)
	}
	return filepath.Join(dir, fmt.Sprintf("control-%d.sock", st.Ino)), nil
}

// makeDir creates the directory of path, and refuses one in which other users could create files.
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
		return os.Chmod(dir, 0o755) // the umask was narrow; the socket's own mode protects it
	}
	return nil
}
