package control

import (
	"fmt"
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
	return PathIn(dir, st.Ino), nil
}

// PathIn is Path for the network namespace with this inode.
func PathIn(dir string, ino uint64) string {
	return filepath.Join(dir, fmt.Sprintf("control-%d.sock", ino))
}
